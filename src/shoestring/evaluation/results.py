"""Result files: what was measured, on what, with which command, as dated JSON that tables are made from."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["machine_name", "provenance", "write_result"]


def machine_name(device: str = "cpu") -> str:
    """A short name of the hardware, for file names: `nvidia-h200`, `cpu-2threads-avx512_bf16`."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        device = "cuda" if device == "auto" else device
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    best = next(
        (name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if flags.get(name)), "plain"
    )
    return f"cpu-{torch.get_num_threads()}threads-{best}"


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Date, machine, versions, commit and command of this run."""
    versions = {"python": platform.python_version()}
    for package in ("shoestring", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "source"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine_name(device),
        "cpus": os.cpu_count(),
        "versions": versions,
        "commit": _commit(),
        "command": " ".join(["python", *_module_or_script(), *sys.argv[1:]]),
    }


def write_result(path: Path, result: dict[str, Any], device: str = "cpu") -> None:
    """Write a result with its provenance (atomically, keys in the order given)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**provenance(device), **result}, indent=1) + "\n")
    part.replace(path)


def _commit() -> str:
    if given := os.environ.get("GIT_COMMIT"):  # where the source travels without its history
        return given
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _module_or_script() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return ["-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]

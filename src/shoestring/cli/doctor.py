"""`shoestring doctor`: what this machine can use and, for each thing it can't, why and the command that mends it."""

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Annotated

import typer

from shoestring.cli import options as opt
from shoestring.cli.terminal import output, print_json
from shoestring.units import format_bytes

__all__ = ["doctor"]

_OPTIONAL = {
    "peft": ("adapters (adapter=...)", "pip install 'shoestring[train]'"),
    "matplotlib": ("plots of runs and of attention", "pip install 'shoestring[train]'"),
    "sacrebleu": ("translation scores", "pip install 'shoestring[evaluate]'"),
    "triton": ("fused GPU kernels", "installed with PyTorch for CUDA; see pytorch.org"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `ok` False needs mending; None is merely absent here."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def doctor(
    json: opt.Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything needs mending.")] = False,
) -> None:
    """Say what this machine can use and, for each thing it can't, why and what mends it.

    Example: shoestring doctor --json
    """
    findings = list(_findings())
    if json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        from rich.table import Table

        marks = {True: "[green]yes[/]", False: "[red]no[/]", None: "[dim]-[/]"}
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        for finding in findings:
            remedy = f"\n[dim]{_escaped(finding.remedy)}[/]" if finding.remedy else ""
            table.add_row(marks[finding.ok], finding.name, _escaped(finding.detail) + remedy)
        output().print(table)
    if strict and any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _findings() -> Iterator[Finding]:
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _libraries,
        _processor,
        _native,
        _accelerators,
        _fast_feedforward,
        _extras,
        _cache,
    ]
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    from shoestring import __version__

    yield Finding("shoestring", True, __version__)
    version = platform.python_version()
    yield Finding(
        "python", sys.version_info >= (3, 11), f"{version} on {platform.system()} {platform.machine()}"
    )


def _libraries() -> Iterator[Finding]:
    for name, least in (("torch", (2, 11)), ("transformers", (5, 17))):
        version = metadata.version(name)
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        wanted = ".".join(map(str, least))
        ok = numbers >= least
        remedy = "" if ok else f"pip install '{name}>={wanted}'"
        yield Finding(name, ok, version if ok else f"{version}, and {wanted} or newer is needed", remedy)


def _processor() -> Iterator[Finding]:
    import torch

    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    named = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16", "sve")
    sets = [name for name in named if known.get(name)]
    threads = torch.get_num_threads()
    yield Finding(
        "processor", True, f"{threads} threads; {', '.join(sets) or 'no vector instructions known'}"
    )
    fast = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(sets))
    detail = "computed in hardware" if fast else "not computed in hardware here: dtype auto takes float32"
    yield Finding("bfloat16 on the CPU", fast or None, detail)


def _native() -> Iterator[Finding]:
    if util.find_spec("shoestring._native") is not None:
        from shoestring import _native

        best = _native.instruction_sets()[-1]
        threads = _native.available_processors()
        yield Finding("native step", True, f"built; runs its {best} kernels here, on {threads} threads")
        return
    compiler = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)
    why = (
        "no C++ compiler was found when it was installed"
        if compiler is None
        else "the build failed or was skipped"
    )
    remedy = (
        "install a C++17 compiler (Debian: apt install g++), then: pip install --force-reinstall --no-deps shoestring"
        if compiler is None
        else "pip install --verbose --force-reinstall --no-deps shoestring shows the build"
    )
    yield Finding(
        "native step", False, f"not built ({why}); PyTorch does its work, and Python plans drafts", remedy
    )


def _accelerators() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            yield Finding(f"cuda:{index}", True, f"{about.name}, {format_bytes(about.total_memory)}")
            yield _fused_step(index)
        return
    if torch.backends.mps.is_available():
        yield Finding("mps", True, "Apple GPU")
        return
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        remedy = "install PyTorch for CUDA: pip install --force-reinstall torch"
        yield Finding(
            "cuda", False, "there is an NVIDIA driver, and this PyTorch is built for the CPU", remedy
        )
        return
    yield Finding("cuda", None, "no GPU that PyTorch can use; models run on the CPU")


def _fused_step(index: int) -> Finding:
    """Whether one step of a Llama-like model is a few fused kernels and one CUDA graph here."""
    import torch

    from shoestring.engine.cuda import why_not_here

    reason = why_not_here(torch.device("cuda", index))
    if reason is None:
        return Finding(
            f"fused step on cuda:{index}",
            True,
            "Triton kernels and CUDA graphs; for models of the Llama family (others run transformers' modules)",
        )
    remedy = (
        "pip install triton"
        if "Triton" in reason
        else "models run on transformers' modules, which are slower"
    )
    return Finding(f"fused step on cuda:{index}", False, reason, remedy)


def _fast_feedforward() -> Iterator[Finding]:
    """Which kernels a fast feedforward layer has, on the CPU and on each GPU; what is not there PyTorch does."""
    import torch

    from shoestring.fastff import native, triton_reach

    if native.available():
        from shoestring import _native

        detail = f"C++ kernels for {_native.instruction_sets()[-1]}, inference and training"
        yield Finding("fast feedforward on the CPU", True, detail)
    else:
        yield Finding(
            "fast feedforward on the CPU",
            None,
            "no C++ kernels, as the native step is not built: PyTorch's products",
        )
    if not torch.cuda.is_available():
        yield Finding("fast feedforward on a GPU", None, "no Triton kernels: no GPU that PyTorch can use")
        return
    for index in range(torch.cuda.device_count()):
        reason = triton_reach.why_not_here(torch.device("cuda", index))
        detail = f"no Triton kernels: {reason}" if reason else "Triton kernels, inference and training"
        yield Finding(f"fast feedforward on cuda:{index}", not reason or None, detail)


def _extras() -> Iterator[Finding]:
    for name, (purpose, remedy) in _OPTIONAL.items():
        if util.find_spec(name) is not None:
            yield Finding(name, True, f"{metadata.version(name)}, for {purpose}")
        else:
            yield Finding(name, None, f"not installed; wanted for {purpose}", remedy)


def _cache() -> Iterator[Finding]:
    from shoestring import hub

    root = hub.cache_root()
    near = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(near).free
    ok = free > 1 << 30
    yield Finding(
        "cache",
        ok,
        f"{root}, {format_bytes(hub.folder_bytes(root))} used, {format_bytes(free)} free",
        "" if ok else "free some disk space, or set SHOESTRING_CACHE to a larger disk",
    )
    for model in hub.list_models():
        if model.kind == "bundled":
            remedy = "" if model.local else f"shoestring pull {model.name}"
            detail = "ready" if model.local else f"not fetched yet ({format_bytes(model.size_bytes)})"
            yield Finding(f"model {model.name}", model.local or None, detail, remedy)

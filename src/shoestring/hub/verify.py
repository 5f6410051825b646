"""Checks of a model folder that read headers only: config, shards, offsets; pickles are never read."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoestring.errors import ModelFileError

__all__ = [
    "PICKLE_REASON",
    "QUANTIZED_WEIGHTS",
    "StoredTensor",
    "has_pickles",
    "is_quantized",
    "read_json",
    "stored_tensors",
    "verify_folder",
    "verify_safetensors",
]

PICKLE_REASON = "pickles can run code when they are read, so only safetensors and GGUF are loaded"

QUANTIZED_WEIGHTS = "quantized.safetensors"
"""The weights of a folder that `shoestring quantize` wrote, instead of `model.safetensors`."""
_MAX_HEADER = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(["BOOL", "U8", "I8"], 8)
    | dict.fromkeys(["F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"], 8)
    | dict.fromkeys(["U16", "I16", "F16", "BF16"], 16)
    | dict.fromkeys(["U32", "I32", "F32"], 32)
    | dict.fromkeys(["U64", "I64", "F64", "C64"], 64)
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies in a file: `dtype` is safetensors' name of its type, `shape` has the slowest axis first."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def verify_folder(path: str | Path) -> Path:
    """Return `path` as a Path if it holds a whole safetensors model.

    Raises:
        ModelFileError: naming the file that is missing or broken, or of a kind that is never read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelFileError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise ModelFileError(_why_no_config(folder))
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelFileError(f"{folder / 'config.json'} names no model_type, so its architecture is unknown")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        verify_safetensors(single)
    elif index.is_file():
        _verify_index(index)
    elif is_quantized(folder):
        verify_safetensors(folder / QUANTIZED_WEIGHTS)
    elif has_pickles(folder):
        raise ModelFileError(f"{folder} holds only pickled weights: {PICKLE_REASON}")
    else:
        raise ModelFileError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")
    return folder


def verify_safetensors(path: Path) -> frozenset[str]:
    """Check a safetensors file's header against its size; return the names of its tensors."""
    return frozenset(stored_tensors(path))


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, where they lie, from its header checked against its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ModelFileError(f"{path} is broken: {size} bytes cannot hold its header of {length} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is broken: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ModelFileError(f"{path} is broken: its header is not a JSON object")
    header.pop("__metadata__", None)
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise ModelFileError(f"{path} is broken: tensor {name!r} starts at byte {start}, not {end}")
        end = stop
    if end != size - 8 - length:
        raise ModelFileError(
            f"{path} is broken or cut short: its tensors take {end} bytes, the file has {size - 8 - length}"
        )
    return {
        name: StoredTensor(
            path, header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + start, stop - start
        )
        for start, stop, name in spans
    }


def is_quantized(folder: Path) -> bool:
    """Whether the folder's weights are those that `shoestring quantize` wrote."""
    plain = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    return (folder / QUANTIZED_WEIGHTS).is_file() and not any(path.is_file() for path in plain)


def has_pickles(folder: Path) -> bool:
    """Whether pickled weights lie in `folder`."""
    return any(True for pattern in _PICKLES for _ in folder.glob(pattern))


def read_json(path: Path) -> Any:
    """Parse a JSON file, or raise one line that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not readable JSON: {error}") from error


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """A tensor's first and last byte, with its size checked against its dtype and shape."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise ModelFileError(f"{path} is broken: its entry for tensor {name!r} is not one of safetensors")
    if dtype not in _BITS:
        raise ModelFileError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}")
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ModelFileError(f"{path} is broken: tensor {name!r} has the impossible shape {shape}")
    if start < 0 or (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ModelFileError(
            f"{path} is broken: bytes {start} to {stop} do not fit tensor {name!r} ({dtype}, shape {shape})"
        )
    return start, stop, name


def _verify_index(index: Path) -> None:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index} has no weight_map")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise ModelFileError(f"{index} names the shard {shard!r}, which is not a file name in its folder")
        shards.setdefault(shard, []).append(tensor)
    for shard, tensors in shards.items():
        path = index.parent / shard
        if not path.is_file():
            raise ModelFileError(f"{path} is missing, and {index.name} names it: fetch it again")
        absent = set(tensors) - verify_safetensors(path)
        if absent:
            raise ModelFileError(f"{path} lacks tensor {min(absent)!r}, which {index.name} says it holds")


def _why_no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter, not a model: name its base model and pass this as adapter="
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"{folder} has no config.json but holds {ggufs[0].name}: name that file itself"
    if has_pickles(folder):
        return f"{folder} has no config.json and holds pickled weights: {PICKLE_REASON}"
    return f"{folder} has no config.json, so it is not a model folder"

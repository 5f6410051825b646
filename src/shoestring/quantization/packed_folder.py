"""Packed matrices on disk: one safetensors file of bytes and a manifest, made once and memory-mapped ever after.

Processes that run the same model share its pages. The file's layout is safetensors' own: each matrix is a tensor of bytes,
and the manifest says how to read it.
"""

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from shoestring.errors import ModelFileError
from shoestring.hub.cache import Progress, locked, require_space, subfolder, whole_folder, write_json
from shoestring.hub.verify import read_json, stored_tensors
from shoestring.quantization.formats import WeightMatrix, WeightType, packed_bytes
from shoestring.quantization.packing import pack, weight_type_for

__all__ = ["MANIFEST", "open_packed", "packed_matrices", "write_packed"]

_VERSION = 1
_WEIGHTS = "weights.safetensors"
MANIFEST = "shoestring.json"
"""The file that says how the matrices are stored."""
_ALIGNMENT = 64
_SPARE = 64 << 20


def packed_matrices(
    key: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    quantize: str | None,
    progress: Progress | None = None,
) -> dict[str, WeightMatrix]:
    """The packed matrices of a model, by name: from the cache, packed into it first where they are not there.

    Args:
        key: names the weights among all others (a hash of the files that hold them).
        shapes: every tensor's shape, by name.
        read: gives a float tensor by its name; called only where something is packed, once a tensor.
        quantize: "int8", "int4", or None: bfloat16.
        progress: called as ("pack", done, total), in tensors.

    Raises:
        ShoestringError: the disk has no room.
    """
    target = subfolder("packed") / f"{key}-{quantize or 'bfloat16'}-v{_VERSION}"
    kinds = {name: weight_type_for(name, shape, quantize) for name, shape in shapes.items()}
    found = open_packed(target / _WEIGHTS, shapes, kinds)
    if found is None:
        with locked(target.name):
            # Another process may have made it while this one waited.
            found = open_packed(target / _WEIGHTS, shapes, kinds)
            if found is None:
                with whole_folder(target) as part:
                    write_packed(
                        part / _WEIGHTS, shapes, kinds, lambda name: pack(read(name), kinds[name]), progress
                    )
                found = open_packed(target / _WEIGHTS, shapes, kinds)
    if found is None:
        raise ModelFileError(f"{target} cannot be read back; remove it and try again")
    return found


def _sizes(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, WeightType]) -> dict[str, int]:
    return {name: packed_bytes(kind, *_rows_and_cols(shapes[name])) for name, kind in kinds.items()}


def _rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def open_packed(
    path: Path, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, WeightType]
) -> dict[str, WeightMatrix] | None:
    """The matrices of a file with its manifest beside it, mapped; None where one is missing, broken or another model's."""
    if not (path.parent / MANIFEST).is_file() or not path.is_file():
        return None
    try:
        manifest, stored = read_json(path.parent / MANIFEST), stored_tensors(path)
    except ModelFileError:
        return None
    sizes = _sizes(shapes, kinds)
    if not isinstance(manifest, dict) or manifest.get("types") != {
        name: kind.name for name, kind in kinds.items()
    }:
        return None
    if {name: tensor.nbytes for name, tensor in stored.items()} != sizes:
        return None
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: WeightMatrix(
            kind,
            *_rows_and_cols(shapes[name]),
            np.frombuffer(view, np.uint8, stored[name].nbytes, stored[name].start),
        )
        for name, kind in kinds.items()
    }


def write_packed(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, WeightType],
    matrix: Callable[[str], WeightMatrix],
    progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the matrices of a model into a file, one after another, and a manifest with `facts` beside it."""
    sizes = _sizes(shapes, kinds)
    require_space(path.parent, sum(sizes.values()) + _SPARE, "packing the weights")
    # Matrices first: they are whole cache lines each, so every one of them starts on one.
    order = sorted(kinds, key=lambda name: sizes[name] % _ALIGNMENT != 0)
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        header[name] = {
            "dtype": "U8",
            "shape": [sizes[name]],
            "data_offsets": [end, end + sizes[name]],
        }
        end += sizes[name]
    raw = json.dumps(header).encode()
    raw += b" " * (-(len(raw) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for done, name in enumerate(order):
            if progress:
                progress("pack", done, len(order))
            file.write(np.ascontiguousarray(matrix(name).data).tobytes())
    if progress:
        progress("pack", len(order), len(order))
    types = {name: kind.name for name, kind in kinds.items()}
    write_json(path.parent / MANIFEST, {"version": _VERSION, **(facts or {}), "types": types})

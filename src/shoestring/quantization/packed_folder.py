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
from shoestring.quantization.formats import WeightMatrix, WeightType
from shoestring.quantization.packing import pack, weight_type_for

__all__ = ["packed_matrices"]

_VERSION = 1
_MANIFEST, _WEIGHTS = "shoestring.json", "weights.safetensors"
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
    found = _open(target, shapes, kinds)
    if found is None:
        with locked(target.name):
            found = _open(target, shapes, kinds)  # another process may have made it while this one waited
            if found is None:
                with whole_folder(target) as part:
                    _write(part, shapes, kinds, read, progress)
                found = _open(target, shapes, kinds)
    if found is None:
        raise ModelFileError(f"{target} cannot be read back; remove it and try again")
    return found


def _sizes(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, WeightType]) -> dict[str, int]:
    from shoestring import _native

    return {
        name: int(_native.matrix_bytes(int(kind), *_rows_and_cols(shapes[name])))
        for name, kind in kinds.items()
    }


def _rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _open(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, WeightType]
) -> dict[str, WeightMatrix] | None:
    """The matrices, mapped; None where the folder is missing, broken or another model's."""
    path = folder / _WEIGHTS
    if not (folder / _MANIFEST).is_file() or not path.is_file():
        return None
    try:
        manifest, stored = read_json(folder / _MANIFEST), stored_tensors(path)
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


def _write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, WeightType],
    read: Callable[[str], Tensor],
    progress: Progress | None,
) -> None:
    sizes = _sizes(shapes, kinds)
    require_space(folder, sum(sizes.values()) + _SPARE, "packing the weights")
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
    with (folder / _WEIGHTS).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for done, name in enumerate(order):
            if progress:
                progress("pack", done, len(order))
            matrix = pack(read(name), kinds[name])
            file.write(np.ascontiguousarray(matrix.data).tobytes())
    if progress:
        progress("pack", len(order), len(order))
    write_json(
        folder / _MANIFEST, {"version": _VERSION, "types": {name: kind.name for name, kind in kinds.items()}}
    )

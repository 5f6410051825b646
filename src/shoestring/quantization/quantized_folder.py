"""A folder that holds a model in int8 or int4: what `shoestring quantize` writes and `load` maps.

Beside the usual config.json and tokenizer: `quantized.safetensors`, each matrix as a tensor of the bytes that the CPU's
kernels read, and `shoestring.json`, which says how each is packed and how the integers were found.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shoestring.errors import ModelFileError, RequestError
from shoestring.hub import ModelSource
from shoestring.hub.cache import Progress, locked, whole_folder
from shoestring.hub.verify import QUANTIZED_WEIGHTS, read_json
from shoestring.quantization.formats import QUANTIZE, WeightMatrix, WeightType, packed_bytes
from shoestring.quantization.packed_folder import MANIFEST, open_packed, write_packed
from shoestring.quantization.packing import unpack_rows, weight_type_for

__all__ = [
    "copy_beside",
    "describe_quantized",
    "quantized_matrices",
    "quantized_rows",
    "require_new",
    "write_quantized",
]

_OWN = (WeightType.F32, WeightType.BF16_TILES, WeightType.INT8_TILES, WeightType.INT4_TILES)


def write_quantized(
    target: Path,
    beside: Callable[[Path], None],
    shapes: Mapping[str, tuple[int, ...]],
    matrix: Callable[[str], WeightMatrix],
    quantize: str,
    made: Mapping[str, Any],
    progress: Progress | None = None,
) -> Path:
    """Write a quantised model's folder, whole or not at all.

    Args:
        target: the folder; there is none yet, or an empty one.
        beside: writes the configuration and the tokenizer into the folder that it is given.
        shapes: every tensor's, by its name below the decoder.
        matrix: a packed tensor by its name, of the type that `weight_type_for` has for it.
        made: how the integers were found, for people.

    Raises:
        RequestError: something lies at `target`.
    """
    require_new(target)
    kinds = {name: weight_type_for(name, shape, quantize) for name, shape in shapes.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(f"quantized-{target.name}"), whole_folder(target) as part:
            beside(part)
            facts = {"quantize": quantize, "made": dict(made)}
            write_packed(part / QUANTIZED_WEIGHTS, shapes, kinds, matrix, progress, facts)
            (part / MANIFEST).chmod(0o644)  # as its neighbours
    except OSError as error:
        raise RequestError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def require_new(target: Path) -> None:
    """Raise RequestError where something lies at `target` already."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RequestError(f"{target} is there already: name a folder that is not")


def describe_quantized(folder: Path) -> Mapping[str, Any]:
    """The manifest of a quantised folder: "quantize", "made", "types".

    Raises:
        ModelFileError: it is missing or broken.
    """
    manifest = read_json(folder / MANIFEST)
    match manifest:
        case {"version": 1, "quantize": str(quantize), "types": dict(types)} if quantize in QUANTIZE:
            known = {kind.name for kind in _OWN}
            if all(isinstance(kind, str) and kind in known for kind in types.values()):
                return dict(manifest)
    raise ModelFileError(
        f"{folder / MANIFEST} does not describe int8 or int4 weights: quantise the model again"
    )


def quantized_matrices(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightMatrix]:
    """A quantised folder's matrices by their names below the decoder, memory-mapped.

    Args:
        shapes: what the model's configuration says that there must be.

    Raises:
        ModelFileError: they are not those of such a model.
    """
    types = describe_quantized(folder)["types"]
    for name in shapes:
        if name not in types:
            raise ModelFileError(f"{folder} lacks the tensor {name!r}: its weights are incomplete")
    kinds = {name: WeightType[types[name]] for name in shapes}
    found = open_packed(folder / QUANTIZED_WEIGHTS, shapes, kinds) if len(types) == len(shapes) else None
    if found is None:
        raise ModelFileError(
            f"{folder / QUANTIZED_WEIGHTS} does not hold the weights that {MANIFEST} and config.json describe"
        )
    return found


def quantized_rows(source: ModelSource, name: str, cols: int, index: Sequence[int]) -> Tensor:
    """Some rows [len(index), cols] of a quantised folder's matrix: only their tiles are read."""
    kind = WeightType[describe_quantized(source.path)["types"][name]]
    data = source.maps()[name]
    rows = 16 * (len(data) // packed_bytes(kind, 16, cols))
    return unpack_rows(WeightMatrix(kind, rows, cols, data), index)


def copy_beside(source: Path, target: Path) -> None:
    """Copy a model folder's small files (configuration, tokenizer, licence), not its weights."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(
            ".index.json"
        )
        if path.is_file() and not weights and path.name != MANIFEST:
            shutil.copyfile(path, target / path.name)

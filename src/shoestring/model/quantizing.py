"""`quantize_model`: a model's weights in int8 or int4, rounded once, in a folder that `load` maps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring import hub
from shoestring.engine.native_loading import stored_tensor, weight_shapes
from shoestring.engine.native_runner import why_not, why_not_built
from shoestring.engine.native_weights import named_weights
from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.hub.cache import Progress
from shoestring.quantization import (
    WeightMatrix,
    calibrated,
    check_quantize,
    copy_beside,
    pack,
    pack_grid,
    require_new,
    weight_type_for,
    write_quantized,
)
from shoestring.quantization.calibration import calibration_windows

__all__ = ["Quantized", "quantize_model"]


@dataclass(frozen=True)
class Quantized:
    """What `quantize_model` wrote."""

    folder: Path
    quantize: str
    method: str
    """"nearest" or "gptq"."""
    nbytes: int
    """Bytes of the folder."""
    seconds: float


def quantize_model(
    model: str,
    output: str | Path,
    quantize: str = "int4",
    *,
    calibration: str | None = None,
    windows: int = 128,
    revision: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Quantized:
    """Write a model's folder with its matrices in int8 or int4, for `load` on a CPU or an NVIDIA GPU.

    Args:
        model: as for `load`; not a folder that is quantised already.
        output: the new folder.
        quantize: "int8" or "int4". Embedding and head are int8 in any case.
        calibration: text that the model should go on being good at. With it weights are rounded by GPTQ (arXiv
            2210.17323), so that outputs stay on such text; without, each to the nearest value of its group's grid.
        windows: how many windows of 512 tokens GPTQ sees, evenly spread over the text.
        device: where GPTQ computes, in float32.
        progress: called as (stage, done, total).

    Raises:
        RequestError: an unknown name or `quantize`, something lies at `output`, or the calibration text is too short.
        UnsupportedModelError: an architecture that the quantised kernels do not run, or the native part is missing.
        ModelFileError, DownloadError: as `load`.
    """
    began = time.perf_counter()
    if check_quantize(quantize) is None:
        raise RequestError("quantize None leaves nothing to do: int8 or int4")
    target = Path(output).expanduser()
    require_new(target)  # before the work, and again when it is written
    source = hub.open_source(model, revision=revision, dtype="auto", quantize=quantize, progress=progress)
    if source.quantized:
        raise RequestError(f"{model} is quantised already: name the model that it was made from")
    reason = why_not_built() or why_not(source.config)
    if reason is not None:
        raise UnsupportedModelError(f"{model} cannot be quantised here: {reason}")
    shapes = weight_shapes(source)
    made: dict[str, Any] = {"from": source.name, "method": "nearest"}
    matrix: Callable[[str], WeightMatrix]
    if calibration is None:
        maps = source.maps()
        matrix = partial(_nearest, source, maps, shapes, quantize)
    else:
        if source.tokenizer is None:
            raise RequestError(f"{model} has no tokenizer to read the calibration text with")
        tokens = calibration_windows(source.tokenizer, calibration, windows)
        made |= {"method": "gptq", "windows": len(tokens), "tokens_of_a_window": tokens.shape[1]}
        matrix = _by_gptq(model, revision, device, tokens, shapes, quantize, progress)
    folder = write_quantized(
        target, partial(copy_beside, source.path), shapes, matrix, quantize, made, progress
    )
    return Quantized(folder, quantize, made["method"], hub.folder_bytes(folder), time.perf_counter() - began)


def _nearest(
    source: hub.ModelSource,
    maps: Any,
    shapes: dict[str, tuple[int, ...]],
    quantize: str,
    name: str,
) -> WeightMatrix:
    return pack(
        stored_tensor(source, maps, name, shapes[name]), weight_type_for(name, shapes[name], quantize)
    )


def _by_gptq(
    model: str,
    revision: str | None,
    device: str,
    tokens: Tensor,
    shapes: dict[str, tuple[int, ...]],
    quantize: str,
    progress: Progress | None,
) -> Callable[[str], WeightMatrix]:
    """Round all of a model's matrices; give each packed by its name."""
    module = hub.load_pretrained(
        model, revision=revision, dtype="float32", device=device, progress=progress
    ).model
    report = None if progress is None else partial(progress, "calibrate")
    grids = calibrated(module, tokens, quantize, progress=report)
    named = {name.removeprefix("model."): grid for name, grid in grids.items()}
    weights = named_weights(module)

    def matrix(name: str) -> WeightMatrix:
        if name in named:
            return pack_grid(named[name])
        weight = weights[name].to(device="cpu", dtype=torch.float32)
        return pack(weight, weight_type_for(name, shapes[name], quantize))

    return matrix

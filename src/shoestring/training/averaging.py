"""The mean of several checkpoints' weights (arXiv 1706.03762, section 6.1: the last 5 or 20)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shoestring.errors import RequestError

__all__ = ["averaged_weights"]


def averaged_weights(checkpoints: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the weights of these checkpoint folders, summed in float64.

    Raises:
        RequestError: there are none, or they hold different weights.
    """
    from safetensors.torch import load_file

    if not checkpoints:
        raise RequestError("there are no checkpoints to average")
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for checkpoint in checkpoints:
        weights = load_file(checkpoint / "model.safetensors")
        if total and set(weights) != set(total):
            raise RequestError(
                f"{checkpoint} holds other weights than {checkpoints[0]}: they cannot be averaged"
            )
        for name, weight in weights.items():
            kinds[name] = weight.dtype
            total[name] = total[name] + weight.double() if name in total else weight.double()
    return {name: (weight / len(checkpoints)).to(kinds[name]) for name, weight in total.items()}

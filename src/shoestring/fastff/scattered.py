"""Training a fast feedforward layer on a GPU: dense products in which only the paths are not zero.

The same as the masked form (arXiv 2311.10770), bit for bit, forward and backward. But the D+1 visited neurons are gathered
from the logits of all, and only they pass through the activation; so between the dense products nothing of the size of
all neurons is computed, only filled with zeros.

Shapes: T tokens, K trees, n nodes, D depth, E hidden size, O output size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoestring.errors import RequestError, suggest
from shoestring.fastff.functional import activation_function, depth_of
from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.methods import METHODS, choose, needs_gradient, run

__all__ = ["TRAINING_METHODS", "ScatteredFastFeedForward", "scattered"]

TRAINING_METHODS = ("scattered", *(method for method in METHODS if method != "native"))


def scattered(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str = "gelu"
) -> Tensor:
    """y [T, O] of rows x [T, E]."""
    function = activation_function(activation)
    trees, count = w_in.shape[:2]
    bias = None if b_in is None else b_in.flatten()
    logits = F.linear(x, w_in.flatten(0, 1), bias).unflatten(-1, (trees, count))  # [T, K, n]
    with torch.no_grad():
        node = torch.zeros(x.shape[0], trees, 1, dtype=torch.long, device=x.device)
        visited = [node]
        for _ in range(depth_of(count)):
            node = 2 * node + 1 + (logits.gather(-1, node) > 0)
            visited.append(node)
        nodes = torch.cat(visited, -1)  # [T, K, D+1]
    values = function(logits.gather(-1, nodes))
    hidden = torch.zeros_like(logits).scatter(-1, nodes, values.to(logits.dtype))
    return hidden.flatten(1) @ w_out.flatten(0, 1)


class ScatteredFastFeedForward(FastFeedForward):
    """A `FastFeedForward` that is trained by `training_method`, and infers by `method`.

    Raises:
        RequestError: as `FastFeedForward`, or an unknown training method.
    """

    def __init__(self, *sizes: int, training_method: str = "scattered", **options: Any) -> None:
        if training_method not in TRAINING_METHODS:
            raise RequestError(
                f"training method {training_method!r} is none of {', '.join(TRAINING_METHODS)}"
                f"{suggest(training_method, TRAINING_METHODS)}"
            )
        super().__init__(*sizes, **options)
        self.training_method = training_method

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., O]."""
        if not needs_gradient(x, self.w_in, self.w_out):
            return super().forward(x)
        self.check(x)
        rows = x.reshape(-1, self.hidden_size)
        weights = (self.w_in, self.b_in, self.w_out)
        if self.training_method == "scattered":
            y = scattered(rows, *weights, self.activation)
        else:
            y = run(choose(rows, *weights, self.training_method), rows, *weights, self.activation)
        return y.view(*x.shape[:-1], self.output_size)

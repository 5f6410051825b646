"""Training a fast feedforward layer on a GPU: dense products in which only the paths are not zero.

The same as the masked form (arXiv 2311.10770), bit for bit, forward and backward. But the D+1 visited neurons are gathered
from the logits of all, and only they pass through the activation; so between the dense products nothing of the size of
all neurons is computed, only filled with zeros.

Nothing in that form keeps a tree in use: a node that sends nearly all tokens one way learns from them alone, and its other
side from none. `balance` pushes against it. With p the share of tokens that visit a node and m the mean over them of
softsign(z), it adds `balance` times the sum of p m^2 over the nodes that route, divided by K * D, to the loss (0: even at
every node, 1: one path), as a gradient only: it enters at the logits, and no loss needs to know of it.

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

__all__ = ["TRAINING_METHODS", "ScatteredFastFeedForward", "imbalance", "scattered"]

# `scattered`: one dense product for all logits, activations on the paths only. `masked`: activations of all, as in the
# paper. `plain`: the loop over levels, by gathering. `sparse`: visited rows only, C++ on a CPU. `triton`: visited rows
# only, on an NVIDIA GPU. `auto`: as `methods.choose` says.
TRAINING_METHODS = ("scattered", *(method for method in METHODS if method != "native"))


def scattered(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    activation: str = "gelu",
    balance: float = 0.0,
) -> Tensor:
    """y [T, O] of rows x [T, E]; `balance` weighs the term that keeps the load even."""
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
    z = logits.gather(-1, nodes)
    if balance and nodes.shape[-1] > 1:
        z = _Balanced.apply(z, nodes, count, balance)
    values = function(z)
    hidden = torch.zeros_like(logits).scatter(-1, nodes, values.to(logits.dtype))
    return hidden.flatten(1) @ w_out.flatten(0, 1)


def imbalance(z: Tensor, nodes: Tensor, count: int) -> Tensor:
    """The balance term of logits z [T, K, D+1] at `nodes`, of `count` nodes a tree: within 0 and 1, differentiable."""
    _, _, means, visits = _node_means(z, nodes, count)
    return (visits * means.square()).sum() / (z.shape[0] * z.shape[1] * (z.shape[2] - 1))


def _node_means(z: Tensor, nodes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softsign(z) without the leaves, where its nodes are among all trees', and each node's mean and visits [K * n]."""
    trees = torch.arange(z.shape[1], device=z.device)[:, None] * count
    where = (nodes[..., :-1] + trees).flatten()
    soft = F.softsign(z[..., :-1].float() if z.dtype != torch.float64 else z[..., :-1]).flatten()
    zeros = soft.new_zeros(z.shape[1] * count)
    visits = zeros.index_add(0, where, torch.ones_like(soft))
    return soft, where, zeros.index_add(0, where, soft) / visits.clamp(min=1), visits


class _Balanced(torch.autograd.Function):
    """z as it is; in backward the gradient of `weight` times `imbalance` is added."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nodes: Tensor, count: int, weight: float) -> Tensor:
        ctx.save_for_backward(z, nodes)
        ctx.count, ctx.weight = count, weight
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        z, nodes = ctx.saved_tensors
        soft, where, means, _ = _node_means(z, nodes, ctx.count)
        slope = (1 - soft.abs()).square()  # softsign's derivative
        push = (2 * ctx.weight / soft.numel() * means[where] * slope).view(*z.shape[:-1], -1)
        return gradients[0] + F.pad(push, (0, 1)).to(z.dtype), None, None, None


class ScatteredFastFeedForward(FastFeedForward):
    """A `FastFeedForward` that is trained by `training_method`, and infers by `method`.

    Attributes:
        balance: the weight of the balance term, for the method "scattered" only.

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
        self.balance = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., O]."""
        if not needs_gradient(x, self.w_in, self.w_out):
            return super().forward(x)
        self.check(x)
        rows = x.reshape(-1, self.hidden_size)
        weights = (self.w_in, self.b_in, self.w_out)
        if self.training_method == "scattered":
            y = scattered(rows, *weights, self.activation, self.balance)
        else:
            y = run(choose(rows, *weights, self.training_method), rows, *weights, self.activation)
        return y.view(*x.shape[:-1], self.output_size)

"""Fast feedforward in plain PyTorch: what every faster method is held against (arXiv 2311.10770, section 2).

A tree of depth D has n = 2**(D+1) - 1 nodes, one neuron each; a token visits D+1 of them:

    node = 0
    for level in 0..D:  z = x . w_in[node] + b_in[node];  y += f(z) * w_out[node];  node = 2 node + 1 + (z > 0)

`z = 0` goes left, and so does a NaN: it reaches the output of its own token and of no other.

Shapes: T tokens, K trees, n nodes, D depth, E hidden size, O output size; `w_in` [K, n, E], `b_in` [K, n] or None,
`w_out` [K, n, O].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shoestring.errors import RequestError, suggest

__all__ = [
    "ACTIVATIONS",
    "activation_function",
    "depth_of",
    "masked",
    "path_mask",
    "paths",
    "plain",
    "visit",
]

# The numbers are the native kernels'.
ACTIVATIONS: dict[str, int] = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name: gelu (exact), gelu_tanh, relu or silu.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in _FUNCTIONS:
        known = ", ".join(_FUNCTIONS)
        raise RequestError(f"activation {name!r} is none of {known}{suggest(name, _FUNCTIONS)}")
    return _FUNCTIONS[name]


def depth_of(nodes: int) -> int:
    """D of a tree of 2**(D+1) - 1 nodes."""
    return (nodes + 1).bit_length() - 2


def visit(x: Tensor, w_in: Tensor, b_in: Tensor | None) -> tuple[Tensor, Tensor]:
    """The nodes [T, K, D+1] on each token's paths, and their logits z; level by level, by gathering rows."""
    trees = torch.arange(w_in.shape[0], device=x.device)
    node = torch.zeros(x.shape[0], w_in.shape[0], dtype=torch.long, device=x.device)
    nodes, logits = [], []
    for _ in range(depth_of(w_in.shape[1]) + 1):
        z = torch.einsum("te,tke->tk", x, w_in[trees, node])  # [T, K]
        if b_in is not None:
            z = z + b_in[trees, node]
        nodes.append(node)
        logits.append(z)
        node = 2 * node + 1 + (z > 0)
    return torch.stack(nodes, -1), torch.stack(logits, -1)


def paths(x: Tensor, w_in: Tensor, b_in: Tensor | None) -> Tensor:
    """The nodes [T, K, D+1] that each token visits in each tree, from the root down."""
    with torch.no_grad():
        return visit(x, w_in, b_in)[0]


def plain(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str = "gelu") -> Tensor:
    """y [T, O], a level at a time; gradients flow through the visited neurons, not through the choice."""
    function = activation_function(activation)
    nodes, logits = visit(x, w_in, b_in)
    trees = torch.arange(w_in.shape[0], device=x.device)
    y = x.new_zeros(x.shape[0], w_out.shape[2])
    for node, z in zip(nodes.unbind(-1), logits.unbind(-1), strict=True):
        y = y + torch.einsum("tk,tko->to", function(z), w_out[trees, node])
    return y


def path_mask(logits: Tensor) -> Tensor:
    """Which nodes are on the paths, [T, K, n] of bool, from the logits [T, K, n] of all nodes; without gradient."""
    with torch.no_grad():
        right = logits > 0
        reached = torch.ones_like(right[..., :1])  # the nodes of a level, [T, K, 2**level]
        levels = [reached]
        for level in range(depth_of(logits.shape[-1])):
            turn = right[..., 2**level - 1 : 2 ** (level + 1) - 1]
            reached = torch.stack([reached & ~turn, reached & turn], -1).flatten(-2)
            levels.append(reached)
        return torch.cat(levels, -1)


def masked(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str = "gelu") -> Tensor:
    """y [T, O] as UltraFastBERT trains it: all logits by one dense product, then zero off the paths."""
    function = activation_function(activation)
    bias = None if b_in is None else b_in.flatten()
    logits = F.linear(x, w_in.flatten(0, 1), bias)  # [T, K*n]
    mask = path_mask(logits.unflatten(-1, w_in.shape[:2])).flatten(-2)
    # Not a product by 0 and 1: infinity times zero is a NaN.
    hidden = torch.where(mask, function(logits), 0.0)
    return hidden @ w_out.flatten(0, 1)

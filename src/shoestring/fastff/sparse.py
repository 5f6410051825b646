"""Training that touches only the paths: an operator whose forward and backward read K * (D+1) rows a token.

Where UltraFastBERT trains by dense products and a mask, this visits the same neurons and gives the same gradients. On
the CPU in float32 both ways are C++; elsewhere they are gathers and `index_add_`, with sums in float32 at least.
`torch.compile` takes it as one opaque operation. Second derivatives are not implemented.
"""

import math
from typing import Any

import torch
from torch import Tensor

from shoestring.fastff import native
from shoestring.fastff.functional import activation_function, depth_of, visit

__all__ = ["activation_slope", "sparse"]


def sparse(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str = "gelu") -> Tensor:
    """y [T, O] of x [T, E]; the gradients of unvisited neurons are zero."""
    activation_function(activation)
    y: Tensor = _forward(x, w_in, b_in, w_out, activation)[0]
    return y


def activation_slope(name: str, z: Tensor) -> Tensor:
    """f'(z) of the activation of that name."""
    if name == "relu":
        return (z > 0).to(z.dtype)
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if name == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        t = torch.tanh(scale * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * 0.044715 * z * z)
    normal = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * normal


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("shoestring::fast_feedforward_sparse", mutates_args=())
def _forward(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not native.why_not(x, w_in, b_in, w_out):
        return native.forward_saving(x, w_in, b_in, w_out, activation)
    visited, logits = visit(x, w_in, b_in)
    hidden = activation_function(activation)(logits)
    trees = torch.arange(w_in.shape[0], device=x.device)
    y = x.new_zeros(x.shape[0], w_out.shape[2], dtype=_sum_type(x.dtype))
    for node, h in zip(visited.unbind(-1), hidden.unbind(-1), strict=True):
        y += torch.einsum("tk,tko->to", h, w_out[trees, node])
    return y.to(x.dtype), visited.int(), logits.to(_sum_type(x.dtype))


@_forward.register_fake
def _(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str) -> tuple[Tensor, ...]:
    way = (x.shape[0], w_in.shape[0], depth_of(w_in.shape[1]) + 1)
    return (
        x.new_empty(x.shape[0], w_out.shape[2]),
        x.new_empty(way, dtype=torch.int32),
        x.new_empty(way, dtype=_sum_type(x.dtype)),
    )


@torch.library.custom_op("shoestring::fast_feedforward_sparse_backward", mutates_args=())
def _backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    visited: torch.Tensor,
    logits: torch.Tensor,
    activation: str,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if w_in.dtype == torch.float32 and not native.why_not(x, w_in, b_in, w_out):
        found = native.backward(grad_y, x, w_in, b_in, w_out, visited, logits, activation, need_x)
    else:
        found = _gather_backward(grad_y, x, w_in, b_in, w_out, visited, logits, activation, need_x)
    grad_x, grad_w_in, grad_b_in, grad_w_out = found
    none = x.new_empty(0)  # an operator returns tensors
    return (
        none if grad_x is None else grad_x,
        grad_w_in,
        none.clone() if grad_b_in is None else grad_b_in,
        grad_w_out,
    )


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    visited: Tensor,
    logits: Tensor,
    activation: str,
    need_x: bool,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        torch.empty_like(w_in),
        x.new_empty(0) if b_in is None else torch.empty_like(b_in),
        torch.empty_like(w_out),
    )


def _gather_backward(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    visited: Tensor,
    logits: Tensor,
    activation: str,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    wide = _sum_type(x.dtype)
    trees, nodes = w_in.shape[:2]
    grad_y, x_wide = grad_y.to(wide), x.to(wide)
    grad_x = torch.zeros_like(x_wide, memory_format=torch.contiguous_format) if need_x else None
    grad_w_in = w_in.new_zeros(trees * nodes, w_in.shape[2], dtype=wide)
    grad_w_out = w_out.new_zeros(trees * nodes, w_out.shape[2], dtype=wide)
    grad_b_in = None if b_in is None else b_in.new_zeros(trees * nodes, dtype=wide)
    hidden, slope = activation_function(activation)(logits), activation_slope(activation, logits)
    flat = visited.long() + nodes * torch.arange(trees, device=x.device)[:, None]  # [T, K, D+1]
    w_in, w_out = w_in.flatten(0, 1), w_out.flatten(0, 1)
    for tree in range(trees):
        for level in range(visited.shape[2]):
            node, h = flat[:, tree, level], hidden[:, tree, level]
            grad_z = (grad_y * w_out[node]).sum(-1) * slope[:, tree, level]
            if grad_x is not None:
                grad_x += grad_z[:, None] * w_in[node]
            grad_w_in.index_add_(0, node, grad_z[:, None] * x_wide)
            grad_w_out.index_add_(0, node, h[:, None] * grad_y)
            if grad_b_in is not None:
                grad_b_in.index_add_(0, node, grad_z)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        grad_w_in.view(trees, nodes, -1).to(w_in.dtype),
        None if grad_b_in is None else grad_b_in.view(trees, nodes).to(w_in.dtype),
        grad_w_out.view(trees, nodes, -1).to(w_out.dtype),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_in, b_in, w_out, ctx.activation = inputs
    _, visited, logits = output
    ctx.mark_non_differentiable(visited, logits)
    ctx.save_for_backward(x, w_in, b_in, w_out, visited, logits)


def _gradients(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, w_in, b_in, w_out, visited, logits = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_w_in, grad_b_in, grad_w_out = _backward(
        grad_y, x, w_in, b_in, w_out, visited, logits, ctx.activation, need_x
    )
    return grad_x if need_x else None, grad_w_in, None if b_in is None else grad_b_in, grad_w_out, None


_forward.register_autograd(_gradients, setup_context=_keep)

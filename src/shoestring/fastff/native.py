"""The C++ kernels of fast feedforward layers: one layer or a stack of them a call, and the way back for training.

A token's output does not depend, bit for bit, on the other tokens of its batch or on the number of threads. Weights
are read where PyTorch has them; a kernel keeps addresses, so whoever keeps a kernel keeps the tensors.
"""

from collections.abc import Sequence
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.errors import MissingDependencyError, RequestError
from shoestring.fastff.functional import ACTIVATIONS, depth_of

__all__ = [
    "FastFeedForwardStack",
    "available",
    "backward",
    "forward",
    "forward_saving",
    "kernel_of",
    "why_not",
]

_DTYPES = (torch.float32, torch.bfloat16)
_BUILT = util.find_spec("shoestring._native") is not None


def available() -> bool:
    """Whether the native part was built."""
    return _BUILT


def why_not(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor) -> str:
    """Why the kernels cannot take these tensors; empty where they can."""
    if not available():
        return "the native part of Shoestring is not built: reinstall it where there is a C++17 compiler"
    if x.device.type != "cpu" or w_in.device.type != "cpu":
        return f"the native kernels run on the CPU, not on {w_in.device}"
    if (
        w_in.dtype not in _DTYPES
        or w_out.dtype != w_in.dtype
        or (b_in is not None and b_in.dtype != w_in.dtype)
    ):
        return f"the native kernels take float32 and bfloat16 weights of one dtype, not {w_in.dtype}"
    if not (w_in.is_contiguous() and w_out.is_contiguous() and (b_in is None or b_in.is_contiguous())):
        return "the native kernels need contiguous weights"
    return ""


def kernel_of(
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    activation: str,
    *,
    residual: bool = False,
    instruction_set: str = "",
) -> Any:
    """The kernel over these weights: `run(x, y, tokens, threads)` with the addresses of x [T, E] and y [T, O]."""
    return _kernel([(w_in, b_in, w_out)], activation, residual, instruction_set)


def _kernel(
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    activation: str,
    residual: bool,
    instruction_set: str,
) -> Any:
    from shoestring import _native

    w_in, _, w_out = layers[0]
    addresses = [(w.data_ptr(), 0 if b is None else b.data_ptr(), v.data_ptr()) for w, b, v in layers]
    trees, nodes, width = w_in.shape
    return _native.FastFeedForward(
        width, w_out.shape[2], depth_of(nodes), trees, w_in.dtype == torch.bfloat16, ACTIVATIONS[activation],
        addresses, residual, instruction_set,
    )  # fmt: skip


def _check(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor) -> None:
    if reason := why_not(x, w_in, b_in, w_out):
        raise MissingDependencyError(reason) if not available() else RequestError(reason)
    if x.dtype != w_in.dtype:
        raise RequestError(f"the input is {x.dtype}, the weights {w_in.dtype}")


def forward(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str = "gelu") -> Tensor:
    """y [T, O], without gradient.

    Raises:
        RequestError: the kernels cannot take these tensors (see `why_not`).
    """
    _check(x, w_in, b_in, w_out)
    x = x.detach().contiguous()
    y = x.new_empty(x.shape[0], w_out.shape[2])
    kernel = kernel_of(w_in, b_in, w_out, activation)
    kernel.run(x.data_ptr(), y.data_ptr(), x.shape[0], torch.get_num_threads())
    return y


def forward_saving(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, O], and for `backward` the visited nodes (int32) and logits (float32), both [T, K, D+1]."""
    _check(x, w_in, b_in, w_out)
    x = x.contiguous()
    way = (x.shape[0], w_in.shape[0], depth_of(w_in.shape[1]) + 1)
    y = x.new_empty(x.shape[0], w_out.shape[2])
    visited, logits = x.new_empty(way, dtype=torch.int32), x.new_empty(way, dtype=torch.float32)
    kernel_of(w_in, b_in, w_out, activation).run_saving(
        x.data_ptr(), y.data_ptr(), visited.data_ptr(), logits.data_ptr(), x.shape[0], torch.get_num_threads()
    )
    return y, visited, logits


def backward(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    visited: Tensor,
    logits: Tensor,
    activation: str,
    need_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Gradients of x, w_in, b_in and w_out (float32); each visited row is written once, the others are zero."""
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x) if need_x else None
    grad_w_in, grad_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
    grad_b_in = None if b_in is None else torch.empty_like(b_in)
    kernel_of(w_in, b_in, w_out, activation).backward(
        grad_y.data_ptr(), x.data_ptr(), visited.data_ptr(), logits.data_ptr(),
        0 if grad_x is None else grad_x.data_ptr(), grad_w_in.data_ptr(),
        0 if grad_b_in is None else grad_b_in.data_ptr(), grad_w_out.data_ptr(), x.shape[0], torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_w_in, grad_b_in, grad_w_out


class FastFeedForwardStack:
    """Layers of one shape, one after another in a single call of C++: inference on the CPU.

    Args:
        layers: `FastFeedForward` modules, or anything with their `w_in`, `b_in`, `w_out` and `activation`.
        residual: each layer's input is added to its output.
        threads: None: PyTorch's.
        instruction_set: one of `_native.instruction_sets()`; None: the best.

    Raises:
        RequestError: the layers differ in shape, dtype or activation, or the kernels cannot take them.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        residual: bool = False,
        threads: int | None = None,
        instruction_set: str | None = None,
    ) -> None:
        if not layers:
            raise RequestError("a stack needs at least one layer")
        self._layers: list[Any] = list(layers)
        first = self._layers[0]
        for index, layer in enumerate(self._layers):
            for name in ("w_in", "b_in", "w_out"):
                one, other = getattr(first, name), getattr(layer, name)
                if (one is None) != (other is None) or (one is not None and one.shape != other.shape):
                    raise RequestError(f"layer {index}'s {name} has another shape than layer 0's")
            if layer.activation != first.activation or layer.w_in.dtype != first.w_in.dtype:
                raise RequestError(f"layer {index} has another activation or dtype than layer 0")
            _check(layer.w_in.flatten(0, 1), layer.w_in, layer.b_in, layer.w_out)
        if (len(self._layers) > 1 or residual) and first.w_in.shape[2] != first.w_out.shape[2]:
            raise RequestError(
                f"layers {first.w_in.shape[2]} wide that put out {first.w_out.shape[2]} cannot follow one another"
            )
        self._threads = threads or torch.get_num_threads()
        weights = [(layer.w_in, layer.b_in, layer.w_out) for layer in self._layers]
        self._held = weights  # the kernel has only their addresses
        self._kernel = _kernel(weights, first.activation, residual, instruction_set or "")
        self._width, self._outputs, self._dtype = first.w_in.shape[2], first.w_out.shape[2], first.w_in.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., O], by the weights' memory as it was when the stack was made."""
        if x.shape[-1] != self._width or x.dtype != self._dtype or x.device.type != "cpu":
            raise RequestError(
                f"the input is {x.dtype} {list(x.shape)} on {x.device}; the stack takes {self._dtype} "
                f"[..., {self._width}] on the CPU"
            )
        x = x.detach().contiguous()
        y = x.new_empty(*x.shape[:-1], self._outputs)
        self._kernel.run(x.data_ptr(), y.data_ptr(), x.numel() // self._width, self._threads)
        return y

    def use_huge_pages(self) -> bool:
        """Ask for large pages under the weights (Linux); whether the system gave them all.

        Rows at random places cost a walk of the page tables each, which large pages spare.
        """
        from shoestring import _native

        tensors = [tensor for layer in self._held for tensor in layer if tensor is not None]
        large = [tensor for tensor in tensors if tensor.nbytes >= 4 << 20]
        given = [_native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes) for tensor in large]
        return all(given)

"""How a fast feedforward layer is computed, by name, and which way `auto` takes."""

import torch
from torch import Tensor

from shoestring.errors import RequestError, suggest
from shoestring.fastff import functional, native, triton_reach
from shoestring.fastff.sparse import sparse

__all__ = ["METHODS", "check_method", "choose", "choose_by_size", "needs_gradient", "run"]

METHODS = ("auto", "plain", "masked", "sparse", "native", "triton")

# Tokens up to which gathering rows beats dense products on a device without kernels of ours.
_FEW_TOKENS = 64


def check_method(method: str) -> None:
    """Raises: RequestError: there is no such method."""
    if method not in METHODS:
        raise RequestError(f"method {method!r} is none of {', '.join(METHODS)}{suggest(method, METHODS)}")


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd follows an operation on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def choose(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, method: str = "auto") -> str:
    """The method for rows x [T, E] where `method` is "auto".

    On the CPU the C++ kernels: `native` for inference, `sparse` for training in float32. Elsewhere, and without them, as
    `choose_by_size`.
    """
    if method != "auto":
        return method
    training = needs_gradient(x, w_in, b_in, w_out)
    if not native.why_not(x, w_in, b_in, w_out):
        if training:
            return "sparse" if w_in.dtype == torch.float32 else "masked"
        return "sparse" if torch.compiler.is_compiling() else "native"
    triton = not triton_reach.why_not(x, w_in, b_in, w_out, training=training)
    trees, nodes = w_in.shape[:2]
    return choose_by_size(x.shape[0], trees, functional.depth_of(nodes), training=training, triton=triton)


def choose_by_size(tokens: int, trees: int, depth: int, *, training: bool, triton: bool) -> str:
    """The method without C++ kernels; `triton`: whether its kernels can take the tensors.

    `triton` where that was measured to be faster; else `plain` for a few tokens and `masked`, which is dense products, for
    training and many tokens.
    """
    if triton and triton_reach.pays(tokens, trees, depth, training=training):
        return "triton"
    return "plain" if tokens <= _FEW_TOKENS and not training else "masked"


def run(method: str, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str) -> Tensor:
    """y [T, O] of rows x [T, E] by a method of that name (not "auto"); in autocast's type under autocast.

    Raises:
        RequestError: the method is not there, or cannot do this.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(w_in.dtype)
        return _run(method, x, w_in, b_in, w_out, activation).to(torch.get_autocast_dtype(kind))
    return _run(method, x, w_in, b_in, w_out, activation)


def _run(method: str, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str) -> Tensor:
    if method == "plain":
        return functional.plain(x, w_in, b_in, w_out, activation)
    if method == "masked":
        return functional.masked(x, w_in, b_in, w_out, activation)
    if method == "sparse":
        return sparse(x, w_in, b_in, w_out, activation)
    if method == "native":
        if needs_gradient(x, w_in, b_in, w_out):
            raise RequestError("method='native' is inference only: train by 'sparse', or use torch.no_grad()")
        return native.forward(x, w_in, b_in, w_out, activation)
    if x.device.type != "cuda":
        raise RequestError(f"method='triton' runs on an NVIDIA GPU, and the layer is on {x.device}")
    # Imported here, as Triton is slow to import; by statements, which torch.compile follows.
    if needs_gradient(x, w_in, b_in, w_out):
        from shoestring.fastff.triton_training import apply

        return apply(x, w_in, b_in, w_out, activation)
    from shoestring.fastff.triton_inference import infer

    return infer(x, w_in, b_in, w_out, activation)

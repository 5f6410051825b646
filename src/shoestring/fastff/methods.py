"""How a fast feedforward layer is computed, by name, and which way `auto` takes."""

import torch
from torch import Tensor

from shoestring.errors import RequestError, suggest
from shoestring.fastff import functional

__all__ = ["METHODS", "check_method", "choose", "run"]

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


def choose(x: Tensor, w_in: Tensor, method: str) -> str:
    """The method for rows x [T, E], where `method` is "auto"."""
    if method != "auto":
        return method
    if x.shape[0] <= _FEW_TOKENS and not needs_gradient(x, w_in):
        return "plain"
    return "masked"


def run(method: str, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, activation: str) -> Tensor:
    """y [T, O] of rows x [T, E] by a method of that name (not "auto").

    Raises:
        RequestError: the method is not there, or cannot do this.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(w_in.dtype)
    if method == "plain":
        return functional.plain(x, w_in, b_in, w_out, activation)
    if method == "masked":
        return functional.masked(x, w_in, b_in, w_out, activation)
    raise RequestError(f"method {method!r} is not available here")

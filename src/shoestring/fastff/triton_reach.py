"""Which fast feedforward layers the Triton kernels take, and for which they are the faster way; imports no Triton."""

from functools import cache

import torch
from torch import Tensor

from shoestring.engine.cuda import why_not_here as _why_not_here
from shoestring.fastff.functional import depth_of

__all__ = ["DTYPES", "MAX_GROUPED_LEVELS", "pays", "why_not", "why_not_here", "why_not_weights"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_GROUPED_LEVELS = 15  # 2^8 groups of 2^7 - 1 nodes: more columns than that leave the registers

# Measured by benchmarks.fast_feedforward_gpu (bf16, one tree): from here on the kernels are faster than `plain`, in
# training than `masked`, and in inference than the dense products that `masked` is made of.
_LEAST_DEPTH = 11
_MOST_TREES = 1
_LEAST_TRAINING_TOKENS = 4096


@torch.compiler.assume_constant_result  # the search for Triton is not for a graph
def why_not_here(device: torch.device) -> str:
    """Why the kernels do not run on this device; empty where they do."""
    return _reason(device)


@cache
def _reason(device: torch.device) -> str:
    return _why_not_here(device) or ""


def why_not_weights(
    w_in: Tensor, b_in: Tensor | None, w_out: Tensor, *, training: bool, compiling: bool = False
) -> str:
    """Why the kernels cannot take these weights, on a device where they run; empty where they can.

    `training`: with gradients. `compiling`: inside `torch.compile`, which knows training as one operation, inference not.
    """
    if (
        w_in.dtype not in DTYPES
        or w_out.dtype != w_in.dtype
        or (b_in is not None and b_in.dtype != w_in.dtype)
    ):
        return f"the Triton kernels take float32, bfloat16 and float16 weights of one dtype, not {w_in.dtype}"
    if not (w_in.is_contiguous() and w_out.is_contiguous()):
        return "the Triton kernels need contiguous weights, and copy others at each call"
    levels = depth_of(w_in.shape[1]) + 1
    if training and levels > MAX_GROUPED_LEVELS:
        return f"the Triton kernels train trees of at most {MAX_GROUPED_LEVELS} levels, not {levels}"
    if compiling and not training:
        return "the Triton kernels of inference are not an operation of torch.compile"
    return ""


def why_not(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, *, training: bool) -> str:
    """Why the kernels cannot take these tensors; empty where they can."""
    reason = why_not_here(x.device)
    return reason or why_not_weights(
        w_in, b_in, w_out, training=training, compiling=torch.compiler.is_compiling()
    )


def pays(tokens: int, trees: int, depth: int, *, training: bool) -> bool:
    """Whether the kernels were measured to be the faster way at such a size."""
    return (
        depth >= _LEAST_DEPTH and trees <= _MOST_TREES and (not training or tokens >= _LEAST_TRAINING_TOKENS)
    )

"""What happens to rows between the matrices: embeddings, the last norm of output rows, norms behind a sub-layer (Gemma).

The residual stream is float32 whatever the model computes in: it is a few kilobytes a row, and sums that are not rounded
at every layer make a row's logits depend less on the shape of its step.
"""
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.launching import launch_options
from shoestring.engine.cuda.layout import DeviceLayout

__all__ = [
    "RowNorm",
    "add_normed",
    "add_normed_twin",
    "embed",
    "embed_twin",
    "take_normed",
    "take_normed_twin",
]


@dataclass(frozen=True)
class RowNorm:
    """An RMSNorm: `x / rms(x) * gain`, or `* (1 + gain)` where `adds_one`."""

    gain: Float[Tensor, " E"]
    epsilon: float
    adds_one: bool = False

    def __call__(self, x: Float[Tensor, "R E"]) -> Float[Tensor, "R E"]:
        """The plain form, in float32."""
        x = x.float()
        gain = self.gain.float() + (1.0 if self.adds_one else 0.0)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * gain


def embed(
    layout: DeviceLayout,
    embedding: Float[Tensor, "V E"],
    own: Float[Tensor, "N E"],
    out: Float[Tensor, "R E"],
    scale: float = 1.0,
) -> None:
    """Write each row's input embedding into `out`: its token's, times `scale`, or its own where its tree brings one.

    Args:
        own: embeddings that rows bring, [N, E]; `layout.embedded` says which, and they are not scaled.
    """
    rows, width = out.shape
    embed_kernel[(rows,)](
        layout.token, layout.embedded, embedding, own, out, width, embedding.stride(0), own.stride(0), scale,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


def embed_twin(
    layout: DeviceLayout, embedding: Float[Tensor, "V E"], own: Float[Tensor, "N E"], scale: float = 1.0
) -> Float[Tensor, "R E"]:
    """The same in plain PyTorch."""
    found = embedding[layout.token.long()].float() * scale
    brought = own[(layout.embedded.long() - 1).clamp(min=0)].float()
    return torch.where(layout.embedded[:, None] != 0, brought, found)


def take_normed(
    layout: DeviceLayout, x: Float[Tensor, "R E"], norm: RowNorm, out: Float[Tensor, "O E"], pdl: bool = False
) -> None:
    """Write the normalised output rows into `out`; zeros where the layout has none."""
    outputs, width = out.shape
    take_normed_kernel[(outputs,)](
        layout.output_row, x, norm.gain, out, width, x.stride(0), out.stride(0), norm.epsilon,
        ADDS_ONE=norm.adds_one, BLOCK=triton.next_power_of_2(width), num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip


def take_normed_twin(layout: DeviceLayout, x: Float[Tensor, "R E"], norm: RowNorm) -> Float[Tensor, "O E"]:
    """The same in plain PyTorch, in float32."""
    rows = layout.output_row.long()
    return norm(x[rows.clamp(min=0)]) * (rows >= 0)[:, None]


def add_normed(
    layout: DeviceLayout, y: Float[Tensor, "R E"], norm: RowNorm, x: Float[Tensor, "R E"], pdl: bool = False
) -> None:
    """`x += norm(y)` in place: a sub-layer whose output is normalised before it is added."""
    rows, width = x.shape
    add_normed_kernel[(rows,)](
        layout.slot, y, norm.gain, x, width, y.stride(0), x.stride(0), norm.epsilon,
        ADDS_ONE=norm.adds_one, BLOCK=triton.next_power_of_2(width), num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip


def add_normed_twin(y: Float[Tensor, "R E"], norm: RowNorm, x: Float[Tensor, "R E"]) -> Float[Tensor, "R E"]:
    """The same in plain PyTorch, into a new tensor."""
    return x + norm(y)


@triton.jit(do_not_specialize=["width"])
def embed_kernel(
    token, embedded, embedding, own, out, width, embedding_stride, own_stride, scale, BLOCK: tl.constexpr
):
    """Grid (R,)."""
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < width
    which = tl.load(embedded + row)
    brings = which != 0
    at = embedding + tl.load(token + row).to(tl.int64) * embedding_stride + e
    of_token = tl.load(at, mask=inside & ~brings, other=0.0).to(tl.float32) * scale
    of_row = tl.load(own + (which - 1).to(tl.int64) * own_stride + e, mask=inside & brings, other=0.0)
    result = tl.where(brings, of_row.to(tl.float32), of_token)
    tl.store(out + tl.cast(row, tl.int64) * width + e, result, mask=inside)


@triton.jit
def _normed(x, gain, e, width, inside, epsilon, ADDS_ONE: tl.constexpr):
    mean = tl.sum(x * x, 0) / width
    weight = tl.load(gain + e, mask=inside, other=0.0).to(tl.float32)
    if ADDS_ONE:
        weight += 1.0
    return x * tl.rsqrt(mean + epsilon) * weight


@triton.jit(do_not_specialize=["width"])
def take_normed_kernel(
    output_row,
    x,
    gain,
    out,
    width,
    x_stride,
    out_stride,
    epsilon,
    ADDS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Grid (O,)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    output = tl.program_id(0)
    row = tl.load(output_row + output)
    e = tl.arange(0, BLOCK)
    inside = e < width
    live = inside & (row >= 0)
    states = tl.load(x + row.to(tl.int64) * x_stride + e, mask=live, other=0.0).to(tl.float32)
    result = _normed(states, gain, e, width, inside, epsilon, ADDS_ONE)
    tl.store(out + tl.cast(output, tl.int64) * out_stride + e, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def add_normed_kernel(
    slot,
    y,
    gain,
    x,
    width,
    y_stride,
    x_stride,
    epsilon,
    ADDS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Grid (R,)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    if tl.load(slot + row) < 0:
        return
    e = tl.arange(0, BLOCK)
    inside = e < width
    states = tl.load(y + tl.cast(row, tl.int64) * y_stride + e, mask=inside, other=0.0).to(tl.float32)
    at = x + tl.cast(row, tl.int64) * x_stride + e
    before = tl.load(at, mask=inside, other=0.0)
    tl.store(at, before + _normed(states, gain, e, width, inside, epsilon, ADDS_ONE), mask=inside)

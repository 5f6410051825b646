"""Head norms, rotary positions and cache writes in one launch, where attention does not do them on its way.

The packed row is `[q heads, k heads, v heads] x D`. Queries and keys are normalised per head where the model does (Qwen3,
Gemma 3), rotated in pairs (i, i + half) of the first `rotary_dim` numbers, and keys and values go to storage position
n + tree_row of their slot's blocks. All arithmetic is float32; numbers are rounded once, where they are stored.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.attention_kernels import TRITON_TYPES
from shoestring.engine.cuda.launching import launch_options
from shoestring.engine.cuda.layout import BLOCK_TOKENS, DeviceLayout

__all__ = ["Turning", "rotary_table", "rotary_twin", "rotate_and_store"]

_PAGE: tl.constexpr = tl.constexpr(BLOCK_TOKENS)
_HEADS_PER_PROGRAM = 4


@dataclass(frozen=True)
class Turning:
    """What a layer does to its queries and keys before they meet: norms of heads, then rotary positions.

    Args:
        cosines: a table of `rotary_table`.
        query_gain, key_gain: of the heads' RMS norm, both or neither.
        adds_one: the gain is 1 more.
    """

    cosines: Float[Tensor, "P rotary_dim"]
    query_gain: Float[Tensor, " D"] | None = None
    key_gain: Float[Tensor, " D"] | None = None
    epsilon: float = 1e-6
    adds_one: bool = False

    def __post_init__(self) -> None:
        assert (self.query_gain is None) == (self.key_gain is None)

    @property
    def norms(self) -> bool:
        """Whether heads are normalised."""
        return self.query_gain is not None


def rotary_table(
    inverse_frequencies: Float[Tensor, " half"], positions: int, scale: float = 1.0
) -> Float[Tensor, "P rotary_dim"]:
    """Cosines, then sines, of every position; `scale` is the model's attention factor (YaRN)."""
    angles = torch.arange(positions, device=inverse_frequencies.device)[:, None] * inverse_frequencies.float()
    return torch.cat([angles.cos(), angles.sin()], dim=1) * scale


def rotate_and_store(
    packed: Float[Tensor, "R heads*D"],
    turning: Turning,
    table: Tensor,
    layer: int,
    layout: DeviceLayout,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cache_dtype: torch.dtype,
    pdl: bool = False,
) -> None:
    """Turn the rows' queries and keys where they are, and write keys and values into the cache; padded rows write nothing.

    Args:
        packed: the layer's projections, biases added; rows may be strided.
        table: addresses [slots, blocks] int64 of the cache's blocks.
        pdl: start before the kernel in front has ended (Hopper).
    """
    rotary_kernel[(packed.shape[0], -(-(heads + 2 * kv_heads) // _HEADS_PER_PROGRAM))](
        packed, turning.cosines, table, turning.query_gain, turning.key_gain,
        layout.slot, layout.position, layout.tree_row, layout.cached, layout.table_row,
        packed.stride(0), table.stride(0), layer, heads, kv_heads, turning.epsilon,
        D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_H=_HEADS_PER_PROGRAM,
        ROTARY=turning.cosines.shape[1], CACHE=TRITON_TYPES[cache_dtype], NORM=turning.norms, ADDS_ONE=turning.adds_one,
        num_warps=2 if head_dim <= 128 else 4, **launch_options(pdl),
    )  # fmt: skip


def rotary_twin(
    packed: Float[Tensor, "R heads*D"],
    turning: Turning,
    blocks: Sequence[Sequence[Tensor]],
    layer: int,
    layout: DeviceLayout,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    """The same in plain PyTorch, in the precision of `packed`; `blocks` are those of each row of the table."""
    rows = torch.nonzero(layout.slot >= 0)[:, 0]
    split = packed[rows].unflatten(1, (-1, head_dim))
    q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
    if turning.query_gain is not None and turning.key_gain is not None:
        q, k = (
            states
            * (states.square().mean(-1, keepdim=True) + turning.epsilon).rsqrt()
            * (gain + turning.adds_one)
            for states, gain in ((q, turning.query_gain), (k, turning.key_gain))
        )
    cos, sin = turning.cosines[layout.position[rows]].to(packed.dtype)[:, None].chunk(2, dim=-1)
    half = cos.shape[-1]

    def rotate(states: Tensor) -> Tensor:
        first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    q, k = rotate(q), rotate(k)
    packed[rows] = torch.cat([q, k, v], dim=1).flatten(1).to(packed.dtype)
    for index, row in enumerate(rows.tolist()):
        slot = int(layout.slot[row])
        at = int(layout.cached[slot] + layout.tree_row[row])
        block = blocks[int(layout.table_row[slot])][at // BLOCK_TOKENS]
        block[layer, 0, :, at % BLOCK_TOKENS] = k[index].to(block.dtype)
        block[layer, 1, :, at % BLOCK_TOKENS] = v[index].to(block.dtype)


@triton.jit(do_not_specialize=["table_stride", "layer", "heads", "kv_heads"])
def rotary_kernel(
    packed, cosines, table, query_gain, key_gain, slot_of, position, tree_row, cached, table_row,
    packed_stride, table_stride, layer, heads, kv_heads, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_H: tl.constexpr, CACHE: tl.constexpr,
    NORM: tl.constexpr, ADDS_ONE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (rows, blocks of heads): see `rotate_and_store`."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    slot = tl.load(slot_of + row)
    if slot < 0:
        return
    d = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = ROTARY // 2
    turned = d < ROTARY
    angle = cosines + tl.load(position + row).to(tl.int64) * ROTARY + tl.where(d < HALF, d, d - HALF)
    cos = tl.load(angle, mask=turned, other=1.0)
    sin = tl.load(angle + HALF, mask=turned, other=0.0)
    sin = tl.where(d < HALF, -sin, sin)
    at_token = tl.load(cached + slot) + tl.load(tree_row + row)
    base = tl.load(table + tl.load(table_row + slot).to(tl.int64) * table_stride + at_token // _PAGE)
    if PDL:
        gdc_wait()  # all before is the layout, which is as old as the step
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_query, is_value = head < heads, head >= heads + kv_heads
    inside = (head < heads + 2 * kv_heads)[:, None] & (d < D)[None, :]
    at = packed + tl.cast(row, tl.int64) * packed_stride + head[:, None] * D
    own = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    # The other of the pair, read again instead of moved between threads; beyond `rotary_dim` it is not used.
    pair = tl.where(d < HALF, d + HALF, tl.where(d < ROTARY, d - HALF, d))
    other = tl.load(at + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.math.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        gain = _gain(query_gain, key_gain, is_query, d, D, ADDS_ONE)
        pair_gain = _gain(query_gain, key_gain, is_query, pair, D, ADDS_ONE)
        rotated = own * scale * gain * cos[None, :] + other * scale * pair_gain * sin[None, :]
    else:
        rotated = own * cos[None, :] + other * sin[None, :]
    result = tl.where(is_value[:, None], own, rotated)
    tl.debug_barrier()  # all pairs were read
    tl.store(at + d[None, :], result.to(packed.dtype.element_ty), mask=inside & ~is_value[:, None])
    block = tl.multiple_of(base.to(tl.pointer_type(CACHE)), 16)
    # The block's planes are [layer, key | value, head]: k and v heads lie one behind another in the row, too.
    plane = tl.multiple_of(layer * 2 * kv_heads * (_PAGE * D) + at_token % _PAGE * D, 16)
    to_cache = block + plane + (head - heads)[:, None] * (_PAGE * D) + d[None, :]
    tl.store(to_cache, result.to(CACHE), mask=inside & ~is_query[:, None])


@triton.jit
def _gain(query_gain, key_gain, is_query, d, D: tl.constexpr, ADDS_ONE: tl.constexpr):
    """The norm's gain [heads, D] of query heads and others."""
    of_query = tl.load(query_gain + d, mask=d < D, other=0.0).to(tl.float32)
    of_key = tl.load(key_gain + d, mask=d < D, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :]) + (1.0 if ADDS_ONE else 0.0)

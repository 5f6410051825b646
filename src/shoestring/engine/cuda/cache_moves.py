"""The last commit's cache moves: an accepted path's keys and values go where the next tokens of a chain would lie.

Commits cost nothing until the next step begins, and nothing at all where the path is the tree's first rows.
"""
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoestring.engine.cuda.attention_kernels import TRITON_TYPES
from shoestring.engine.cuda.layout import BLOCK_TOKENS, DeviceLayout

__all__ = ["move_rows", "move_rows_twin"]

_PAGE: tl.constexpr = tl.constexpr(BLOCK_TOKENS)


def move_rows(
    table: Tensor,
    layout: DeviceLayout,
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    cache_dtype: torch.dtype,
) -> None:
    """Move each slot's kept rows, in all layers, keys and values.

    Args:
        table: addresses [slots, blocks] int64 of cache blocks in `cache_dtype`.
        layout: its moves; sources rise and none lies before its target.
    """
    move_kernel[(layers * 2 * kv_heads, layout.bucket.slots)](
        table, layout.move_table_row, layout.move_first, layout.move_count, layout.move_source,
        table.stride(0), layout.move_source.stride(0), D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        CHUNK=64 if head_dim <= 128 else 32, CACHE=TRITON_TYPES[cache_dtype], num_warps=4,
    )  # fmt: skip


def move_rows_twin(blocks: Sequence[Sequence[Tensor]], layout: DeviceLayout) -> None:
    """The same in plain PyTorch; `blocks` are those of each row of the table."""
    for slot, count in enumerate(layout.move_count.tolist()):
        pages = blocks[int(layout.move_table_row[slot])]
        first = int(layout.move_first[slot])
        sources = layout.move_source[slot, :count].tolist()
        moved = [pages[at // BLOCK_TOKENS][..., at % BLOCK_TOKENS, :].clone() for at in sources]
        for at, states in enumerate(moved, first):
            pages[at // BLOCK_TOKENS][..., at % BLOCK_TOKENS, :] = states


@triton.jit(do_not_specialize=["table_stride", "source_stride"])
def move_kernel(
    table, move_table_row, move_first, move_count, move_source, table_stride, source_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Grid (L * 2 * K, slots): a program moves one plane's rows of one slot."""
    plane, slot = tl.program_id(0), tl.program_id(1)
    count = tl.load(move_count + slot)
    if count == 0:
        return
    first = tl.load(move_first + slot)
    pages = table + tl.load(move_table_row + slot).to(tl.int64) * table_stride
    d = tl.arange(0, BLOCK_D)
    # In chunks, in order: what a chunk overwrites lies before all sources of later ones, or was read before.
    for begin in range(0, count, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        live = index < count
        mask = live[:, None] & (d < D)[None, :]
        source = tl.load(move_source + slot * source_stride + index, mask=live, other=0)
        target = first + index
        states = tl.load(_address(pages, source, live, plane, d, D, CACHE), mask=mask, other=0.0)
        tl.debug_barrier()  # all is read before anything is written
        tl.store(_address(pages, target, live, plane, d, D, CACHE), states, mask=mask)


@triton.jit
def _address(pages, position, live, plane, d, D: tl.constexpr, CACHE: tl.constexpr):
    """Where one plane's numbers of these storage positions lie, [rows, D]."""
    base = tl.load(pages + position // _PAGE, mask=live, other=0)
    block = tl.multiple_of(base.to(tl.pointer_type(CACHE)), 16)
    inner = tl.multiple_of((plane * _PAGE + position % _PAGE) * D, 16)
    return (block + inner)[:, None] + d[None, :]

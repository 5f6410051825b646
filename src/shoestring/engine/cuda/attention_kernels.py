"""The kernels of tree attention; `shoestring.engine.cuda.attention` says what they compute and how the work is cut."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.layout import BLOCK_TOKENS

__all__ = ["TRITON_TYPES", "attention_kernel", "merge_kernel"]

TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The cache's types as kernels name them."""

PAGE: tl.constexpr = tl.constexpr(BLOCK_TOKENS)


@triton.jit
def locate(row_count, slots, tile, SLOTS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """The slot of a tile (`slots` or more where it has none), its first row in the tree, and all rows there are."""
    index = tl.arange(0, SLOTS)
    counts = tl.load(row_count + index, mask=index < slots, other=0)
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    if SLOTS == 1:
        ends = tiles
    else:
        ends = tl.cumsum(tiles, 0)
    slot = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(index < slot, tiles, 0), 0)
    return slot, (tile - before) * TILE_ROWS, tl.sum(counts, 0)


@triton.jit
def _shares(n, row, last, chain, window, splits, min_blocks, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """A tile's first and last block of keys, blocks per share, shares."""
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(n + tl.where(chain, row, 0) - window + 1, 0) // BLOCK_N
    end = (n + last + BLOCK_N - 1) // BLOCK_N
    share = tl.maximum((end - begin + splits - 1) // splits, min_blocks)
    return begin, end, share, (end - begin + share - 1) // share


@triton.jit
def load_keys(
    pages, layer, head, heads, start, key, some, wanted, d, D: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values [N, D] at the positions `key`, from `start` on; none are read unless there are some.

    MASKED: zeros where they are not wanted.
    """
    if key.shape[0] <= PAGE:
        base = tl.load(pages + start // PAGE, mask=some, other=0)
    elif MASKED:
        base = tl.load(pages + key // PAGE, mask=wanted, other=0)
    else:
        base = tl.load(pages + key // PAGE)
    block = tl.multiple_of(base.to(tl.pointer_type(CACHE)), 16)
    offset = tl.multiple_of((layer * 2 * heads + head) * (PAGE * D), PAGE)
    at = (block + key % PAGE * D)[:, None] + (offset + d)[None, :]
    stride = tl.multiple_of(heads * (PAGE * D), PAGE)
    if MASKED:
        mask = wanted[:, None] & (d < D)[None, :]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + stride, mask=mask, other=0.0)
    if D < BLOCK_D:
        mask = (d < D)[None, :]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + stride, mask=mask, other=0.0)
    return tl.load(at), tl.load(at + stride)


@triton.jit
def _visible(
    key, n, count, chain, row, valid, bits, position, oldest, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Which keys [N] the rows [M] see: the cache, their own ancestors and themselves, none before the window.

    Args:
        bits: where each row's ancestors lie, 256 bits.
        position: the positions of the tree's rows.
        oldest: the position behind which a row's window begins.
    """
    own = key - n
    in_tree = (own >= 0) & (own < count)
    # A block of keys touches so many of the eight words at most.
    MOST: tl.constexpr = min(8, BLOCK_N // 32 + 1) if BLOCK_N >= 32 else 2
    first = tl.maximum(tl.min(own, 0), 0) // 32
    words = tl.zeros([row.shape[0], BLOCK_N], tl.int32)
    for word in tl.static_range(MOST):
        found = tl.load(bits + first + word, mask=valid & ~chain & (first + word < 8), other=0)
        words = tl.where((own // 32 == first + word)[None, :], found[:, None], words)
    visible = (((words >> (own & 31)[None, :]) & 1) != 0) & (in_tree & ~chain)[None, :]
    visible = visible | (own < 0)[None, :] | (chain & in_tree[None, :] & (own[None, :] <= row[:, None]))
    if HAS_WINDOW:
        at_position = tl.load(position + own, mask=in_tree & ~chain, other=0)
        at_position = tl.where(in_tree & ~chain, at_position, key)
        visible = visible & (oldest[:, None] < at_position[None, :])
    return visible


@triton.jit
def attend(
    q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):
    """One block of keys more: the running maximum (base 2), the sum of exponentials and the weighted values."""
    if q.dtype == tl.float32:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k))
    if HAS_SOFTCAP:
        capped = 1 - 2 / (tl.exp(scores * (2 * scale / softcap)) + 1)  # tanh
        scores = capped * (softcap * 1.4426950408889634)
    else:
        scores = scores * (scale * 1.4426950408889634)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    if MASKED:
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
    else:
        pivot = higher
    weights = tl.exp2(scores - pivot[:, None])
    shrink = tl.exp2(top - pivot)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if q.dtype == tl.float32:
        acc = tl.dot(weights, v, acc, input_precision="ieee")
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc)
    return higher, total, acc


@triton.jit
def merge(
    out, values, sums, row, head, valid, d, out_stride, heads, splits, used,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the shares of a tile in their order and write it; rows are the step's."""
    share = (row * heads + head) * splits
    inside = valid[:, None] & (d[None, :] < D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Four at a time, so that their loads are under way together.
    for split in tl.range(0, used, loop_unroll_factor=4):
        # ".cg": other programs wrote them; L1 may not know.
        sum2 = tl.load(sums + share + split, mask=valid, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            values + (share + split)[:, None].to(tl.int64) * D + d[None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        higher = tl.maximum(top, sum2)
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp2(top - pivot), tl.exp2(sum2 - pivot)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        top = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = out + row[:, None].to(tl.int64) * out_stride + head[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slots", "rows", "table_stride", "layer", "window", "splits", "min_blocks"])
def attention_kernel(
    query, out, table, cached, first_row, row_count, is_chain, table_row, position, ancestors, values, sums, arrived,
    slots, rows, query_stride, out_stride, table_stride, layer, window, splits, min_blocks, scale, softcap,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, CACHE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MERGE_LAST: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles, K, splits): see `tree_attention`."""
    if PDL:
        gdc_launch_dependents()
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    slot, tile_row, all_rows = locate(row_count, slots, tile, SLOTS, TILE_ROWS)
    mine = tl.minimum(slot, slots - 1)
    n = tl.load(cached + mine)
    count = tl.load(row_count + mine)
    first = tl.load(first_row + mine)
    chain = tl.load(is_chain + mine) != 0
    pages = table + tl.load(table_row + mine).to(tl.int64) * table_stride
    last = tl.minimum(tile_row + TILE_ROWS, count)
    begin, end, share, used = _shares(
        n, tile_row, last, chain, window, splits, min_blocks, BLOCK_N, HAS_WINDOW
    )
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_head = head * GROUP + m % GROUP
    row = tile_row + m // GROUP
    valid = (m < TILE_ROWS * GROUP) & (row < count) & (slot < slots)
    step_row = first + row
    if HAS_WINDOW:
        oldest = tl.load(position + step_row, mask=valid, other=0) - window
    else:
        oldest = row
    begin += split * share
    end = tl.minimum(begin + share, end)
    idle = (slot >= slots) | (split >= used)
    offsets = tl.arange(0, BLOCK_N)
    bits, own_position = ancestors + step_row * 8, position + first
    # Before the wait is the layout, which is as old as the step, and the first block's keys that are older.
    start = begin * BLOCK_N
    key = start + offsets
    visible = _visible(
        key, n, count, chain, row, valid & ~idle, bits, own_position, oldest, BLOCK_N, HAS_WINDOW
    )
    k, v = load_keys(
        pages, layer, head, heads, start, key, ~idle, (key < n) & ~idle, d, D, BLOCK_D, CACHE, True
    )
    if PDL:
        gdc_wait()
    if split == 0:
        for padded in range(all_rows + tile, rows, tl.num_programs(0)):
            at = out + tl.cast(padded, tl.int64) * out_stride + query_head[:, None] * D + d[None, :]
            zeros = tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty)
            tl.store(at, zeros, mask=(m < GROUP)[:, None] & (d < D)[None, :])
    if idle:
        return
    inside = valid[:, None] & (d[None, :] < D)
    at = query + step_row[:, None].to(tl.int64) * query_stride + query_head[:, None] * D + d[None, :]
    q = tl.load(at, mask=inside, other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if (begin + 1) * BLOCK_N > n:
        own = (key >= n) & (key < n + count)
        new_k, new_v = load_keys(
            pages, layer, head, heads, start, key, True, own, d, D, BLOCK_D, CACHE, True
        )
        k, v = tl.where(own[:, None], new_k, k), tl.where(own[:, None], new_v, v)
    top, total, acc = attend(
        q, k.to(q.dtype), v.to(q.dtype), visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True
    )
    # Below `plain` all rows see all keys (but for the window): the cache, row 0 and, in a chain, the rows before the tile.
    plain = (n + 1 + tl.where(chain, tile_row, 0)) // BLOCK_N
    plain = tl.minimum(tl.maximum(plain, begin + 1), end)
    for block in range(begin + 1, plain):
        start = block * BLOCK_N
        key = start + offsets
        k, v = load_keys(pages, layer, head, heads, start, key, True, key >= 0, d, D, BLOCK_D, CACHE, False)
        visible = oldest[:, None] < key[None, :]
        top, total, acc = attend(
            q, k.to(q.dtype), v.to(q.dtype), visible, top, total, acc, scale, softcap, HAS_SOFTCAP, HAS_WINDOW
        )
    for block in range(plain, end):
        start = block * BLOCK_N
        key = start + offsets
        k, v = load_keys(
            pages, layer, head, heads, start, key, True, key < n + count, d, D, BLOCK_D, CACHE, True
        )
        visible = _visible(key, n, count, chain, row, valid, bits, own_position, oldest, BLOCK_N, HAS_WINDOW)
        top, total, acc = attend(
            q, k.to(q.dtype), v.to(q.dtype), visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True
        )

    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    if used > 1:  # never where there is but one split
        share_at = (step_row * (heads * GROUP) + query_head) * splits + split
        tl.store(values + share_at[:, None].to(tl.int64) * D + d[None, :], acc, mask=inside)
        tl.store(sums + share_at, top + tl.log2(total), mask=valid)
        if MERGE_LAST:
            tl.debug_barrier()  # all threads' stores come before the count
            counter = arrived + tile * heads + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                tl.store(counter, 0)
                merge(
                    out, values, sums, step_row, query_head, valid, d, out_stride, heads * GROUP, splits, used,
                    BLOCK_M, D, BLOCK_D,
                )  # fmt: skip
    else:
        at = out + step_row[:, None].to(tl.int64) * out_stride + query_head[:, None] * D + d[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slots", "window", "splits", "min_blocks"])
def merge_kernel(
    out, cached, first_row, row_count, is_chain, values, sums, slots, out_stride, window, splits, min_blocks,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, K): merge the shares that `attention_kernel` left, where there is more than one."""
    tile, head = tl.program_id(0), tl.program_id(1)
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    slot, tile_row, _ = locate(row_count, slots, tile, SLOTS, TILE_ROWS)
    if slot >= slots:
        return
    count = tl.load(row_count + slot)
    last = tl.minimum(tile_row + TILE_ROWS, count)
    chain = tl.load(is_chain + slot) != 0
    _, _, _, used = _shares(
        tl.load(cached + slot), tile_row, last, chain, window, splits, min_blocks, BLOCK_N, HAS_WINDOW
    )
    if used > 1:
        m = tl.arange(0, BLOCK_M)
        row = tile_row + m // GROUP
        valid = (m < TILE_ROWS * GROUP) & (row < count)
        step_row = tl.load(first_row + slot) + row
        query_head = head * GROUP + m % GROUP
        merge(
            out, values, sums, step_row, query_head, valid, tl.arange(0, BLOCK_D), out_stride,
            tl.num_programs(1) * GROUP, splits, used, BLOCK_M, D, BLOCK_D,
        )  # fmt: skip

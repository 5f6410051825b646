"""The kernel of a step's attention: projections in, attended rows and the cache's new entries out.

One launch does what head norms, rotary positions, cache writes and attention would each take one for: small models wait for
launches, not for numbers. What it computes, and how it is cut, is in `shoestring.engine.cuda.attention`.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.attention_kernels import PAGE, attend, load_keys, locate, merge

__all__ = ["rows_attention_kernel"]


@triton.jit
def _angles(cosines, position, inside, d, ROTARY: tl.constexpr):
    """Cosines and signed sines [rows, D] at the rows' positions; beyond `rotary_dim` nothing turns."""
    HALF: tl.constexpr = ROTARY // 2
    at = cosines + position.to(tl.int64)[:, None] * ROTARY + tl.where(d < HALF, d, d - HALF)[None, :]
    mask = inside[:, None] & (d < ROTARY)[None, :]
    cos = tl.load(at, mask=mask, other=1.0)
    sin = tl.load(at + HALF, mask=mask, other=0.0)
    return cos, tl.where((d < HALF)[None, :], -sin, sin)


@triton.jit
def _gains(gain, d, pair, D: tl.constexpr, NORM: tl.constexpr, ADDS_ONE: tl.constexpr):
    """A head norm's gain [D], and that of each number's pair."""
    own, other = d.to(tl.float32), d.to(tl.float32)
    if NORM:
        own = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32) + (1.0 if ADDS_ONE else 0.0)
        other = tl.load(gain + pair, mask=d < D, other=0.0).to(tl.float32) + (1.0 if ADDS_ONE else 0.0)
    return own, other


@triton.jit
def _turned(own, other, cos, sin, gain, pair_gain, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Heads [rows, D], normalised where the model does, at their positions; `other` holds each number's pair."""
    own, other = own.to(tl.float32), other.to(tl.float32)
    if NORM:
        scale = tl.math.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        own, other = own * scale * gain[None, :], other * scale * pair_gain[None, :]
    return own * cos + other * sin


@triton.jit
def _seen(r, r0, count, chain, row, valid, bits, position, oldest, HAS_WINDOW: tl.constexpr):
    """Which of the step's own rows r [N] the rows [M] see: their ancestors and themselves, none before the window."""
    words = tl.load(bits + r0 // 32, mask=valid & ~chain, other=0)
    ancestors = ((words[:, None] >> (r & 31)[None, :]) & 1) != 0
    seen = tl.where(chain, r[None, :] <= row[:, None], ancestors) & (r < count)[None, :]
    if HAS_WINDOW:
        seen = seen & (oldest[:, None] < position[None, :])
    return seen


@triton.jit(do_not_specialize=["slots", "rows", "table_stride", "layer", "window", "splits", "min_blocks"])
def rows_attention_kernel(
    packed, out, cosines, query_gain, key_gain, table, cached, first_row, row_count, is_chain, table_row, position,
    ancestors, values, sums, arrived,
    slots, rows, packed_stride, out_stride, table_stride, layer, window, splits, min_blocks, scale, softcap, eps,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, HAS_WINDOW: tl.constexpr, CACHE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, ADDS_ONE: tl.constexpr, APART: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles, K, splits): shares of the cached keys, the last of which also has the step's own, or (APART) these alone."""
    if PDL:
        gdc_launch_dependents()
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    HALF: tl.constexpr = ROTARY // 2
    slot, tile_row, all_rows = locate(row_count, slots, tile, SLOTS, TILE_ROWS)
    mine = tl.minimum(slot, slots - 1)
    n = tl.load(cached + mine)
    count = tl.load(row_count + mine)
    first = tl.load(first_row + mine)
    chain = tl.load(is_chain + mine) != 0
    pages = table + tl.load(table_row + mine).to(tl.int64) * table_stride
    last = tl.minimum(tile_row + TILE_ROWS, count)  # rows beyond it are nobody's ancestors here
    end = (n + BLOCK_N - 1) // BLOCK_N
    begin = 0
    if HAS_WINDOW:
        begin = tl.minimum(tl.maximum(n + tl.where(chain, tile_row, 0) - window + 1, 0) // BLOCK_N, end)
    most = splits - 1 if APART else splits
    share = tl.maximum((end - begin + most - 1) // most, min_blocks)
    used = (end - begin + share - 1) // share
    if APART:
        used += 1
    else:
        used = tl.maximum(used, 1)
    idle = (slot >= slots) | (split >= used)
    if idle & (split > 0):
        return  # without the wait: others of this launch take it
    owns = (split == used - 1) & ~idle
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    pair = tl.where(d < HALF, d + HALF, tl.where(d < ROTARY, d - HALF, d))
    query_head = head * GROUP + m % GROUP
    row = tile_row + m // GROUP
    valid = (m < TILE_ROWS * GROUP) & (row < count) & (slot < slots)
    step_row = first + row
    # Before the wait is the layout, which is as old as the step, and keys that are older.
    at_position = tl.load(position + step_row, mask=valid, other=0)
    oldest = at_position - window
    offsets = tl.arange(0, BLOCK_N)
    start = begin * BLOCK_N
    key = start + offsets
    cached_key = (key < n) & (begin < end) & ~idle
    some = (begin < end) & ~idle
    k, v = load_keys(pages, layer, head, heads, start, key, some, cached_key, d, D, BLOCK_D, CACHE, True)
    cos, sin = _angles(cosines, at_position, valid, d, ROTARY)
    gain, pair_gain = _gains(query_gain, d, pair, D, NORM, ADDS_ONE)
    r = tl.arange(0, BLOCK_R)
    bits = ancestors + step_row * 8
    own = (r < last) & owns
    own_position = tl.load(position + first + r, mask=own, other=0)
    key_cos, key_sin = _angles(cosines, own_position, own, d, ROTARY)
    key_gains, key_pair_gains = _gains(key_gain, d, pair, D, NORM, ADDS_ONE)
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
    query_at = packed + step_row[:, None].to(tl.int64) * packed_stride + query_head[:, None] * D
    mine_q = tl.load(query_at + d[None, :], mask=inside, other=0.0)
    pair_q = tl.load(query_at + pair[None, :], mask=inside, other=0.0)
    # The step's first own keys and values: the row's k heads lie behind its q heads, and its v heads behind these.
    key_at = packed + (heads * GROUP + head) * D
    own_at = key_at + (first + r).to(tl.int64)[:, None] * packed_stride
    own_inside = own[:, None] & (d < D)[None, :]
    raw_k = tl.load(own_at + d[None, :], mask=own_inside, other=0.0)
    pair_k = tl.load(own_at + pair[None, :], mask=own_inside, other=0.0)
    new_v = tl.load(own_at + heads * D + d[None, :], mask=own_inside, other=0.0)
    q = _turned(mine_q, pair_q, cos, sin, gain, pair_gain, eps, D, NORM).to(packed.dtype.element_ty)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if some:
        visible = tl.broadcast_to(cached_key[None, :], [BLOCK_M, BLOCK_N])
        if HAS_WINDOW:
            visible = visible & (oldest[:, None] < key[None, :])
        top, total, acc = attend(
            q, k.to(q.dtype), v.to(q.dtype), visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True
        )
    for block in range(begin + 1, end):
        start = block * BLOCK_N
        key = start + offsets
        k, v = load_keys(pages, layer, head, heads, start, key, True, key < n, d, D, BLOCK_D, CACHE, True)
        visible = tl.broadcast_to((key < n)[None, :], [BLOCK_M, BLOCK_N])
        if HAS_WINDOW:
            visible = visible & (oldest[:, None] < key[None, :])
        top, total, acc = attend(
            q, k.to(q.dtype), v.to(q.dtype), visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True
        )
    if owns:
        new_k = _turned(raw_k, pair_k, key_cos, key_sin, key_gains, key_pair_gains, eps, D, NORM)
        new_k = new_k.to(CACHE)
        _store(pages, new_k, new_v.to(CACHE), layer, head, heads, n, r, own & (r >= tile_row), d, D, CACHE)
        seen = _seen(r, 0, last, chain, row, valid, bits, own_position, oldest, HAS_WINDOW)
        top, total, acc = attend(
            q, new_k.to(q.dtype), new_v.to(CACHE).to(q.dtype), seen, top, total, acc, scale, softcap, HAS_SOFTCAP, True
        )
        for r0 in range(BLOCK_R, last, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            own = r < last
            own_position = tl.load(position + first + r, mask=own, other=0)
            key_cos, key_sin = _angles(cosines, own_position, own, d, ROTARY)
            own_at = key_at + (first + r).to(tl.int64)[:, None] * packed_stride
            own_inside = own[:, None] & (d < D)[None, :]
            raw_k = tl.load(own_at + d[None, :], mask=own_inside, other=0.0)
            pair_k = tl.load(own_at + pair[None, :], mask=own_inside, other=0.0)
            new_v = tl.load(own_at + heads * D + d[None, :], mask=own_inside, other=0.0)
            new_k = _turned(raw_k, pair_k, key_cos, key_sin, key_gains, key_pair_gains, eps, D, NORM)
            new_k = new_k.to(CACHE)
            _store(pages, new_k, new_v.to(CACHE), layer, head, heads, n, r, own & (r >= tile_row), d, D, CACHE)
            seen = _seen(r, r0, last, chain, row, valid, bits, own_position, oldest, HAS_WINDOW)
            top, total, acc = attend(
                q, new_k.to(q.dtype), new_v.to(CACHE).to(q.dtype), seen, top, total, acc, scale, softcap, HAS_SOFTCAP,
                True,
            )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    if used > 1:  # never where there is but one split
        share_at = (step_row * (heads * GROUP) + query_head) * splits + split
        tl.store(values + share_at[:, None].to(tl.int64) * D + d[None, :], acc, mask=inside)
        tl.store(sums + share_at, top + tl.log2(total), mask=valid)
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


@triton.jit
def _store(pages, k, v, layer, head, heads, n, r, inside, d, D: tl.constexpr, CACHE: tl.constexpr):
    """Put the own rows' keys and values where they belong: behind the n cached ones."""
    place = n + r
    base = tl.load(pages + place // PAGE, mask=inside, other=0)
    block = tl.multiple_of(base.to(tl.pointer_type(CACHE)), 16)
    plane = tl.multiple_of((layer * 2 * heads + head) * (PAGE * D), PAGE)
    at = (block + place % PAGE * D)[:, None] + (plane + d)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(at, k, mask=mask)
    tl.store(at + heads * (PAGE * D), v, mask=mask)

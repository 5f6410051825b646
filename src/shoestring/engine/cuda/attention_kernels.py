"""The kernel of tree attention; `shoestring.engine.cuda.attention` says what it computes and how the work is cut.

Its rows' keys and values come from their projections, those before them from the cache. TURNS: head norms, rotary positions
and cache writes are done on the way. Each would take a launch of its own, and small models wait for launches.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.layout import BLOCK_TOKENS

__all__ = ["TRITON_TYPES", "attention_kernel"]

TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The cache's types as kernels name them."""

_PAGE: tl.constexpr = tl.constexpr(BLOCK_TOKENS)


@triton.jit
def _locate(row_count, slots, tile, SLOTS: tl.constexpr, TILE_ROWS: tl.constexpr):
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
def _load_keys(
    pages, layer, head, heads, start, key, some, wanted, d, D: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values [N, D] at the positions `key`, from `start` on; none are read unless there are some.

    MASKED: zeros where they are not wanted.
    """
    if key.shape[0] <= _PAGE:
        base = tl.load(pages + start // _PAGE, mask=some, other=0)
    elif MASKED:
        base = tl.load(pages + key // _PAGE, mask=wanted, other=0)
    else:
        base = tl.load(pages + key // _PAGE)
    block = tl.multiple_of(base.to(tl.pointer_type(CACHE)), 16)
    offset = tl.multiple_of((layer * 2 * heads + head) * (_PAGE * D), _PAGE)
    at = (block + key % _PAGE * D)[:, None] + (offset + d)[None, :]
    stride = tl.multiple_of(heads * (_PAGE * D), _PAGE)
    if MASKED:
        mask = wanted[:, None] & (d < D)[None, :]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + stride, mask=mask, other=0.0)
    if D < BLOCK_D:
        mask = (d < D)[None, :]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + stride, mask=mask, other=0.0)
    return tl.load(at), tl.load(at + stride)


@triton.jit
def _attend(
    q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):
    """One block of keys more: the running maximum (base 2), the sum of exponentials and the weighted values."""
    v = v.to(q.dtype)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
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
    return higher, total, tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")


@triton.jit
def _merge(
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


@triton.jit
def _by_eights(index, ROTARY: tl.constexpr):
    """Where a head's numbers lie: not in a row, but eight at a time where halves allow it, so that loads may be wide."""
    if ROTARY % 16 == 0:
        index = tl.max_contiguous(tl.multiple_of(index, 8), 8)
    return index


@triton.jit
def _angles(cosines, position, inside, d, ROTARY: tl.constexpr):
    """Cosines and signed sines [rows, D] at the rows' positions; beyond `rotary_dim` nothing turns."""
    HALF: tl.constexpr = ROTARY // 2
    turned = d < ROTARY
    angle = _by_eights(tl.where(d < HALF, d, tl.where(turned, d - HALF, 0)), ROTARY)
    at = cosines + position.to(tl.int64)[:, None] * ROTARY + angle[None, :]
    mask = inside[:, None] & turned[None, :]
    cos, sin = tl.load(at, mask=mask, other=1.0), tl.load(at + HALF, mask=mask, other=0.0)
    return cos, tl.where((d < HALF)[None, :], -sin, sin)


@triton.jit
def _gains(gain, d, pair, D: tl.constexpr, NORM: tl.constexpr, ADDS_ONE: tl.constexpr):
    """A head norm's gain [D], and that of each number's pair."""
    own, other = d.to(tl.float32), d.to(tl.float32)
    if NORM:
        own = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
        other = tl.load(gain + pair, mask=d < D, other=0.0).to(tl.float32)
        if ADDS_ONE:
            own, other = own + 1.0, other + 1.0
    return own, other


@triton.jit
def _turned(own, other, cos, sin, gain, pair_gain, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Heads [rows, D], normalised where the model does, at their positions, in float32; `other`: each number's pair."""
    own, other = own.to(tl.float32), other.to(tl.float32)
    if NORM:
        scale = tl.math.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        own, other = own * scale * gain[None, :], other * scale * pair_gain[None, :]
    return own * cos + other * sin


@triton.jit
def _load_own(at, own, d, pair, heads, D: tl.constexpr, TURNS: tl.constexpr):
    """Keys of the step's own rows [N, D], each number's pair (TURNS), and values; `at`: where the rows' keys lie [N, 1]."""
    mask = own[:, None] & (d < D)[None, :]
    k = tl.load(at + d[None, :], mask=mask, other=0.0)
    other = k
    if TURNS:  # read again instead of moved between threads
        other = tl.load(at + pair[None, :], mask=mask, other=0.0)
    return k, other, tl.load(at + heads * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_own(pages, k, v, layer, head, heads, place, inside, d, D: tl.constexpr, CACHE: tl.constexpr):
    """Put keys and values into the cache, at the storage positions `place`."""
    base = tl.load(pages + place // _PAGE, mask=inside, other=0)
    block = tl.multiple_of(base.to(tl.pointer_type(CACHE)), 16)
    plane = tl.multiple_of((layer * 2 * heads + head) * (_PAGE * D), _PAGE)
    at = (block + place % _PAGE * D)[:, None] + (plane + d)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(at, k, mask=mask)
    tl.store(at + heads * (_PAGE * D), v.to(CACHE), mask=mask)


@triton.jit
def _ancestors(bits, r0, wanted, BLOCK_R: tl.constexpr):
    """Rows' ancestors among the step's own rows from r0 on: two words, of which blocks of at most 32 rows need one."""
    first = tl.load(bits + r0 // 32, mask=wanted, other=0)
    second = first
    if BLOCK_R > 32:
        second = tl.load(bits + r0 // 32 + 1, mask=wanted, other=0)
    return first, second


@triton.jit
def _seen(
    r, last, chain, row, words, more_words, position, oldest, BLOCK_R: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Which of the step's own rows r [N] the rows [M] see: their ancestors and themselves, none before the window.

    Args:
        words, more_words: what `_ancestors` has read.
        position: the positions of the rows r.
        oldest: the position behind which a row's window begins.
    """
    of_row = words[:, None]
    if BLOCK_R > 32:
        of_row = tl.where((r & 32)[None, :] != 0, more_words[:, None], of_row)
    ancestors = ((of_row >> (r & 31)[None, :]) & 1) != 0
    seen = tl.where(chain, r[None, :] <= row[:, None], ancestors) & (r < last)[None, :]
    if HAS_WINDOW:
        seen = seen & (oldest[:, None] < position[None, :])
    return seen


@triton.jit(do_not_specialize=["slots", "rows", "table_stride", "layer", "window", "splits", "min_blocks"])
def attention_kernel(
    packed, out, cosines, query_gain, key_gain, table, cached, first_row, row_count, is_chain, table_row, position,
    ancestors, values, sums, arrived,
    slots, rows, packed_stride, out_stride, table_stride, layer, window, splits, min_blocks, scale, softcap, eps,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, HAS_WINDOW: tl.constexpr, CACHE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, TURNS: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, ADDS_ONE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles, K, splits): see `tree_attention`. The last share of the cached keys also has the step's own."""
    if PDL:
        gdc_launch_dependents()
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    slot, tile_row, all_rows = _locate(row_count, slots, tile, SLOTS, TILE_ROWS)
    mine = tl.minimum(slot, slots - 1)
    n = tl.load(cached + mine)
    count = tl.load(row_count + mine)
    first = tl.load(first_row + mine)
    chain = tl.load(is_chain + mine) != 0
    pages = table + tl.load(table_row + mine).to(tl.int64) * table_stride
    last = tl.minimum(
        tile_row + TILE_ROWS, count
    )  # a parent comes before its row: none sees what lies behind the tile
    end = (n + BLOCK_N - 1) // BLOCK_N
    begin = 0
    if HAS_WINDOW:
        begin = tl.minimum(tl.maximum(n + tl.where(chain, tile_row, 0) - window + 1, 0) // BLOCK_N, end)
    share = tl.maximum((end - begin + splits - 1) // splits, min_blocks)
    used = tl.maximum((end - begin + share - 1) // share, 1)
    idle = (slot >= slots) | (split >= used)
    if idle & (split > 0):
        return  # without a wait: the others of the launch take it
    owns = (split == used - 1) & ~idle
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = ROTARY // 2
    pair = _by_eights(tl.where(d < HALF, d + HALF, tl.where(d < ROTARY, d - HALF, d)), ROTARY)
    query_head = head * GROUP + m % GROUP
    row = tile_row + m // GROUP
    valid = (m < TILE_ROWS * GROUP) & (row < count) & (slot < slots)
    step_row = first + row
    # Before the wait is the layout, which is as old as the step, and the first block's keys, which are older.
    some = (begin < end) & ~idle
    start = begin * BLOCK_N
    offsets = tl.arange(0, BLOCK_N)
    key = start + offsets
    wanted = (key < n) & some
    k, v = _load_keys(pages, layer, head, heads, start, key, some, wanted, d, D, BLOCK_D, CACHE, True)
    at_position = tl.load(position + step_row, mask=valid, other=0)
    oldest = at_position - window
    r = tl.arange(0, BLOCK_R)
    own = (r < last) & owns
    own_position = tl.load(position + first + r, mask=own, other=0)
    bits = ancestors + step_row * 8
    words, more_words = _ancestors(bits, 0, valid & ~chain, BLOCK_R)
    if TURNS:
        cos, sin = _angles(cosines, at_position, valid, d, ROTARY)
        own_cos, own_sin = _angles(cosines, own_position, own, d, ROTARY)
        gain, pair_gain = _gains(query_gain, d, pair, D, NORM, ADDS_ONE)
        own_gain, own_pair_gain = _gains(key_gain, d, pair, D, NORM, ADDS_ONE)
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
    q = tl.load(query_at + d[None, :], mask=inside, other=0.0)
    if TURNS:
        pair_q = tl.load(query_at + pair[None, :], mask=inside, other=0.0)
    # A row's k heads lie behind its q heads, and its v heads behind these.
    keys_at = packed + (heads * GROUP + head) * D
    own_at = keys_at + (first + r).to(tl.int64)[:, None] * packed_stride
    new_k, pair_k, new_v = _load_own(own_at, own, d, pair, heads, D, TURNS)
    if TURNS:
        q = _turned(q, pair_q, cos, sin, gain, pair_gain, eps, D, NORM).to(packed.dtype.element_ty)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if some:
        visible = tl.broadcast_to(wanted[None, :], [BLOCK_M, BLOCK_N])
        if HAS_WINDOW:
            visible = visible & (oldest[:, None] < key[None, :])
        top, total, acc = _attend(q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True)
    # Of blocks full of cached keys all rows see all, but for the window; the last one may not be full.
    full = tl.minimum(tl.maximum(n // BLOCK_N, begin + 1), end)
    for block in range(begin + 1, full):
        start = block * BLOCK_N
        key = start + offsets
        k, v = _load_keys(pages, layer, head, heads, start, key, True, key >= 0, d, D, BLOCK_D, CACHE, False)
        visible = oldest[:, None] < key[None, :]
        top, total, acc = _attend(q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP, HAS_WINDOW)
    for block in range(tl.maximum(full, begin + 1), end):
        start = block * BLOCK_N
        key = start + offsets
        k, v = _load_keys(pages, layer, head, heads, start, key, True, key < n, d, D, BLOCK_D, CACHE, True)
        visible = tl.broadcast_to((key < n)[None, :], [BLOCK_M, BLOCK_N])
        if HAS_WINDOW:
            visible = visible & (oldest[:, None] < key[None, :])
        top, total, acc = _attend(q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True)
    if owns:
        if TURNS:
            new_k = _turned(new_k, pair_k, own_cos, own_sin, own_gain, own_pair_gain, eps, D, NORM).to(CACHE)
            _store_own(pages, new_k, new_v, layer, head, heads, n + r, own & (r >= tile_row), d, D, CACHE)
        seen = _seen(r, last, chain, row, words, more_words, own_position, oldest, BLOCK_R, HAS_WINDOW)
        top, total, acc = _attend(q, new_k, new_v, seen, top, total, acc, scale, softcap, HAS_SOFTCAP, True)
        for r0 in range(BLOCK_R, last, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            own = r < last
            own_position = tl.load(position + first + r, mask=own, other=0)
            words, more_words = _ancestors(bits, r0, valid & ~chain, BLOCK_R)
            own_at = keys_at + (first + r).to(tl.int64)[:, None] * packed_stride
            new_k, pair_k, new_v = _load_own(own_at, own, d, pair, heads, D, TURNS)
            if TURNS:
                own_cos, own_sin = _angles(cosines, own_position, own, d, ROTARY)
                new_k = _turned(new_k, pair_k, own_cos, own_sin, own_gain, own_pair_gain, eps, D, NORM).to(
                    CACHE
                )
                _store_own(pages, new_k, new_v, layer, head, heads, n + r, own & (r >= tile_row), d, D, CACHE)
            seen = _seen(r, last, chain, row, words, more_words, own_position, oldest, BLOCK_R, HAS_WINDOW)
            top, total, acc = _attend(
                q, new_k, new_v, seen, top, total, acc, scale, softcap, HAS_SOFTCAP, True
            )

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
            _merge(
                out, values, sums, step_row, query_head, valid, d, out_stride, heads * GROUP, splits, used,
                BLOCK_M, D, BLOCK_D,
            )  # fmt: skip
    else:
        at = out + step_row[:, None].to(tl.int64) * out_stride + query_head[:, None] * D + d[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=inside)

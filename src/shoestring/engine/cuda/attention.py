"""Tree attention over the paged cache, split over keys: each row sees its slot's cached keys and its own ancestors.

A program takes one slot's tile of rows x one key-value head's query heads and a share of the keys (flash-decoding), so keys
and values are read once for all the heads that share them. Shares are merged by log-sum-exp, in their order, by the
program that arrives last or by a second kernel. Lengths are read on the device: the grid of a bucket never changes, and
programs beyond a slot's length leave at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from shoestring.engine.cuda.layout import BLOCK_TOKENS, DeviceLayout, read_cache

__all__ = ["AttentionPlan", "Workspace", "attention_twin", "tree_attention"]

_PAGE: tl.constexpr = tl.constexpr(BLOCK_TOKENS)


@dataclass(frozen=True)
class AttentionPlan:
    """How a bucket's attention is cut into programs; everything that is fixed when it is captured.

    Args:
        slots, rows: the bucket's.
        heads, kv_heads, head_dim: the model's H, K and D.
        splits: shares of the keys at most; 1 needs no merge.
        block_rows: rows x heads of a tile (a power of two, at least 16 and H / K).
        block_keys: keys of a tile, 16 to 64.
        min_keys: a share is not made smaller than this.
        merge_last: the program that arrives last merges; else a second kernel does.
    """

    slots: int
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    splits: int = 1
    block_rows: int = 16
    block_keys: int = 64
    min_keys: int = 128
    merge_last: bool = True
    warps: int = 4
    stages: int = 2

    @classmethod
    def choose(
        cls,
        slots: int,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        processors: int = 132,
        **settings: Any,
    ) -> "AttentionPlan":
        """A plan for a bucket on a GPU of so many multiprocessors; `settings` override its fields."""
        group = heads // kv_heads
        wide = dtype == torch.float32
        per_slot = -(-rows // slots) * group
        largest = 32 if wide else (64 if rows < 256 or head_dim > 128 else 128)
        block_rows = max(_power_of_two(group), min(_power_of_two(per_slot), largest), 16)
        block_keys = 32 if wide and head_dim > 64 else 64
        plan = {
            "block_rows": block_rows,
            "block_keys": block_keys,
            "warps": 8 if block_rows >= 128 or head_dim > 128 else 4,
            "stages": 1 if wide and head_dim > 128 else 2,
        } | settings
        if "splits" not in plan:
            tiles = cls(slots, rows, heads, kv_heads, head_dim, block_rows=plan["block_rows"]).tiles
            plan["splits"] = 1 if rows >= 256 else max(1, min(32, 2 * processors // (tiles * kv_heads)))
        return cls(slots, rows, heads, kv_heads, head_dim, **plan)

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return self.block_rows // self.group

    @property
    def tiles(self) -> int:
        """Tiles that the bucket's rows fill at most, however they are spread over its slots."""
        return (self.rows + self.slots * (self.tile_rows - 1)) // self.tile_rows


@dataclass(frozen=True)
class Workspace:
    """Shares waiting to be merged; one serves all layers and, sized for the largest, all buckets.

    `values` [R * H * splits * D] and `sums` [R * H * splits] (log2 of the sum of exponentials) in float32, `arrived`
    [tiles * K] int32, zero between launches.
    """

    values: Tensor
    sums: Tensor
    arrived: Tensor

    @classmethod
    def allocate(cls, plans: Sequence[AttentionPlan], device: torch.device | str) -> "Workspace":
        """Room for the largest of the plans."""
        shares = max(plan.rows * plan.heads * plan.splits if plan.splits > 1 else 1 for plan in plans)
        values = max(
            plan.rows * plan.heads * plan.splits * plan.head_dim if plan.splits > 1 else 1 for plan in plans
        )
        arrived = max(plan.tiles * plan.kv_heads for plan in plans)
        return cls(
            torch.zeros(values, dtype=torch.float32, device=device),
            torch.zeros(shares, dtype=torch.float32, device=device),
            torch.zeros(arrived, dtype=torch.int32, device=device),
        )


def tree_attention(
    query: Float[Tensor, "R H D"],
    table: Tensor,
    layer: int,
    layout: DeviceLayout,
    plan: AttentionPlan,
    workspace: Workspace,
    out: Float[Tensor, "R H D"],
    *,
    cache_dtype: torch.dtype,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """Write the rows' attention into `out`; padded rows become zeros.

    Args:
        query: rotated queries; rows may be strided, heads and D are dense. `out` likewise.
        table: addresses [slots, blocks] int64 of cache blocks in `cache_dtype`; the step's own keys are in them.
        window: a row sees only keys at positions above its own minus this; 0: all.
        softcap: scores become softcap * tanh(score / softcap); 0: as they are.
    """
    merge_last = plan.merge_last and plan.splits > 1
    views = (layout.cached, layout.first_row, layout.row_count, layout.is_chain, layout.table_row)
    constants = {
        "SLOTS": _power_of_two(plan.slots), "GROUP": plan.group, "D": plan.head_dim,
        "BLOCK_D": max(16, _power_of_two(plan.head_dim)), "BLOCK_M": plan.block_rows, "BLOCK_N": plan.block_keys,
        "HAS_WINDOW": window > 0,
    }  # fmt: skip
    shares = (workspace.values, workspace.sums, workspace.arrived)
    sizes = (plan.slots, plan.rows, query.stride(0), out.stride(0), table.stride(0))
    blocks = max(1, plan.min_keys // plan.block_keys)
    attention_kernel[(plan.tiles, plan.kv_heads, plan.splits)](
        query, out, table, *views, layout.position, layout.ancestors, *shares, *sizes, layer, window, plan.splits, blocks,
        scale, softcap, **constants, CACHE=_TRITON[cache_dtype], HAS_SOFTCAP=softcap > 0,
        MERGE_LAST=merge_last, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if plan.splits > 1 and not merge_last:
        merge_kernel[(plan.tiles, plan.kv_heads)](
            out, *views[:4], *shares[:2], plan.slots, out.stride(0), window, plan.splits, blocks, **constants, num_warps=plan.warps
        )  # fmt: skip


def attention_twin(
    query: Float[Tensor, "R H D"],
    blocks: Sequence[Sequence[Tensor]],
    layer: int,
    layout: DeviceLayout,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Float[Tensor, "R H D"]:
    """The same in plain PyTorch, slot by slot under a dense mask; `blocks` are those of each row of the table."""
    out = torch.zeros_like(query)
    for slot, count in enumerate(layout.row_count.tolist()):
        if not count:
            continue
        n, first = int(layout.cached[slot]), int(layout.first_row[slot])
        rows = slice(first, first + count)
        key, value = read_cache(blocks[int(layout.table_row[slot])], layer, n + count)
        own = torch.arange(count, device=query.device)
        if layout.is_chain[slot]:
            ancestor = own <= own[:, None]
        else:
            ancestor = (layout.ancestors[rows][:, own // 32] >> (own % 32)) & 1 == 1
        mask = torch.cat([ancestor.new_ones(count, n), ancestor], dim=1)
        if window > 0:
            positions = torch.cat([torch.arange(n, device=query.device), layout.position[rows]])
            mask &= positions > layout.position[rows][:, None] - window
        groups = query.shape[1] // key.shape[0]
        key, value = (
            states.repeat_interleave(groups, dim=0).to(query.dtype) for states in (key, value)
        )  # [H, S, D]
        scores = query[rows].transpose(0, 1) @ key.transpose(1, 2) * scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
        out[rows] = (weights @ value).transpose(0, 1)
    return out


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
def _shares(
    n, row, last, chain, window, splits, min_blocks, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """A tile's first and last block of keys, blocks per share, shares."""
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(n + tl.where(chain, row, 0) - window + 1, 0) // BLOCK_N
    end = (n + last + BLOCK_N - 1) // BLOCK_N
    share = tl.maximum((end - begin + splits - 1) // splits, min_blocks)
    return begin, end, share, (end - begin + share - 1) // share


@triton.jit
def _load_block(
    base, layer, head, heads, key, limit, d, D: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Keys and values [N, D] at the offsets `key` of a block of the cache; zeros from `limit` on, where nothing was written."""
    block = tl.multiple_of(base.to(tl.pointer_type(CACHE)), 16)
    offset = tl.multiple_of((layer * 2 * heads + head) * (_PAGE * D), _PAGE)
    at = block + offset + key[:, None] * D + d[None, :]
    stride = tl.multiple_of(heads * (_PAGE * D), _PAGE)
    if TAIL:
        mask = (key < limit)[:, None] & (d < D)[None, :]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + stride, mask=mask, other=0.0)
    elif D < BLOCK_D:
        mask = (d < D)[None, :]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + stride, mask=mask, other=0.0)
    else:
        return tl.load(at), tl.load(at + stride)


@triton.jit
def _attend(
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
def _merge(
    out, values, sums, row, head, valid, d, out_stride, heads, splits, used, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the shares of a tile in their order and write it; rows are the step's."""
    share = (row * heads + head) * splits
    inside = valid[:, None] & (d[None, :] < D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(used):
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


@triton.jit(
    do_not_specialize=["slots", "rows", "table_stride", "layer", "window", "splits", "min_blocks"]
)
def attention_kernel(
    query, out, table, cached, first_row, row_count, is_chain, table_row, position, ancestors, values, sums, arrived,
    slots, rows, query_stride, out_stride, table_stride, layer, window, splits, min_blocks, scale, softcap,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, CACHE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, 
    MERGE_LAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, K, splits): see `tree_attention`."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    slot, tile_row, all_rows = _locate(row_count, slots, tile, SLOTS, TILE_ROWS)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_head = head * GROUP + m % GROUP
    if split == 0:
        for padded in range(all_rows + tile, rows, tl.num_programs(0)):
            at = out + tl.cast(padded, tl.int64) * out_stride + query_head[:, None] * D + d[None, :]
            zeros = tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty)
            tl.store(at, zeros, mask=(m < GROUP)[:, None] & (d < D)[None, :])
    if slot >= slots:
        return
    n = tl.load(cached + slot)
    count = tl.load(row_count + slot)
    first = tl.load(first_row + slot)
    chain = tl.load(is_chain + slot) != 0
    last = tl.minimum(tile_row + TILE_ROWS, count)
    begin, end, share, used = _shares(n, tile_row, last, chain, window, splits, min_blocks, BLOCK_N, HAS_WINDOW)
    if split >= used:
        return
    row = tile_row + m // GROUP
    valid = (m < TILE_ROWS * GROUP) & (row < count)
    step_row = first + row
    inside = valid[:, None] & (d[None, :] < D)
    at = query + step_row[:, None].to(tl.int64) * query_stride + query_head[:, None] * D + d[None, :]
    q = tl.load(at, mask=inside, other=0.0)
    if HAS_WINDOW:
        oldest = tl.load(position + step_row, mask=valid, other=0) - window
    else:
        oldest = row
    pages = table + tl.load(table_row + slot).to(tl.int64) * table_stride

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin += split * share
    end = tl.minimum(begin + share, end)
    # Below `plain` all rows see all keys (but for the window): the cache, row 0 and, in a chain, the rows before the tile.
    plain = (n + 1 + tl.where(chain, tile_row, 0)) // BLOCK_N
    plain = tl.minimum(tl.maximum(plain, begin), end)
    offsets = tl.arange(0, BLOCK_N)
    for block in range(begin, plain):
        key = block * BLOCK_N
        base = tl.load(pages + key // _PAGE)
        k, v = _load_block(base, layer, head, heads, key % _PAGE + offsets, 0, d, D, BLOCK_D, CACHE, False)
        visible = oldest[:, None] < (key + offsets)[None, :]
        top, total, acc = _attend(
            q, k.to(q.dtype), v.to(q.dtype), visible, top, total, acc, scale, softcap, HAS_SOFTCAP, HAS_WINDOW
        )  # fmt: skip
    for block in range(plain, end):
        key = block * BLOCK_N
        base = tl.load(pages + key // _PAGE)
        inner = key % _PAGE
        limit = n + count - key + inner
        k, v = _load_block(base, layer, head, heads, inner + offsets, limit, d, D, BLOCK_D, CACHE, True)
        own = key + offsets - n
        branching = (own >= 0) & (own < count) & ~chain
        words = tl.load(
            ancestors + step_row[:, None] * 8 + (own // 32)[None, :], mask=valid[:, None] & branching[None, :], other=0
        )  # fmt: skip
        visible = ((words >> (own & 31)[None, :]) & 1) != 0
        visible = visible | (own < 0)[None, :] | (chain & (own[None, :] <= row[:, None]))
        if HAS_WINDOW:
            at_position = tl.load(position + first + own, mask=branching, other=0)
            at_position = tl.where(branching, at_position, key + offsets)
            visible = visible & (oldest[:, None] < at_position[None, :])
        top, total, acc = _attend(
            q, k.to(q.dtype), v.to(q.dtype), visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True
        )  # fmt: skip

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
                _merge(
                    out, values, sums, step_row, query_head, valid, d, out_stride, heads * GROUP, splits, used, BLOCK_M, D, BLOCK_D
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
    slot, tile_row, _ = _locate(row_count, slots, tile, SLOTS, TILE_ROWS)
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
        _merge(
            out, values, sums, step_row, query_head, valid, tl.arange(0, BLOCK_D), out_stride,
            tl.num_programs(1) * GROUP, splits, used, BLOCK_M, D, BLOCK_D,
        )  # fmt: skip


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

"""Tree attention over the paged cache, split over keys: each row sees its slot's cached keys and its own ancestors.

A program takes one slot's tile of rows x one key-value head's query heads and a share of the cached keys (flash-decoding),
so keys and values are read once for all the heads that share them. The last share also has the step's own rows, whose keys
and values are taken from their projections; in small steps these are normalised, turned to their positions and cached on
the way. Shares are merged by log-sum-exp, in their order, by the program that arrives last. Lengths are read on the device:
the grid of a bucket never changes, and programs beyond a slot's length leave at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shoestring.engine.cuda.attention_kernels import TRITON_TYPES, attention_kernel
from shoestring.engine.cuda.launching import launch_options
from shoestring.engine.cuda.layout import DeviceLayout, read_cache
from shoestring.engine.cuda.rotary import Turning, rotate_and_store

__all__ = ["AttentionPlan", "Workspace", "attention_twin", "tree_attention"]


@dataclass(frozen=True)
class AttentionPlan:
    """How a bucket's attention is cut into programs; everything that is fixed when it is captured.

    Args:
        slots, rows: the bucket's.
        heads, kv_heads, head_dim: the model's H, K and D.
        splits: shares of the keys at most; 1 needs no merge.
        block_rows: rows x heads of a tile (a power of two, at least 16 and H / K).
        block_keys: cached keys of a tile, 16 to 256.
        block_own: own keys of a tile, 16, 32 or 64.
        min_keys: a share is not made smaller than this.
        turns: attention itself normalises, turns and caches the step's keys; else a kernel in front does. Every tile turns
            the keys that it sees, so this pays where rows are few.
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
    block_own: int = 16
    turns: bool = True
    warps: int = 4
    stages: int = 3

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
        wide = dtype == torch.float32  # no tensor cores: small tiles and many threads, or registers spill
        if wide:
            largest = 16 if head_dim > 128 else 32
        else:
            largest = 64 if rows < 256 or head_dim > 128 else 128
        per_slot = -(-rows // slots) * group
        most = max(_power_of_two(group), min(_power_of_two(per_slot), largest), 16)
        # A tile's time hardly depends on how many tiles run beside it: small ones, as long as all run at once.
        block_rows = max(_power_of_two(group), 16)
        while block_rows < most and (
            cls(slots, rows, heads, kv_heads, head_dim, block_rows=block_rows).tiles * kv_heads > processors
        ):
            block_rows *= 2
        if wide:
            block_keys, min_keys = 32 if block_rows * head_dim <= 2048 else 16, 128
            warps, stages = 8, 1 if head_dim > 128 else 2
        elif block_rows * head_dim <= 1024:
            # A program's time goes by its instructions: one large block, by many warps, most often needs no merge.
            block_keys, min_keys, warps, stages = 256, 256, 8, 1
        elif block_rows * head_dim <= 2048 and rows <= 16:
            block_keys, min_keys, warps, stages = 128, 128, 8, 1
        else:
            block_keys, min_keys = 64, 128
            warps = 8 if block_rows * head_dim >= 4096 else 4
            # With two stages Triton loads a block only when the one before it is done with.
            stages = 2 if head_dim > 128 or block_rows > 64 else 3
        plan = {
            "block_rows": block_rows,
            "block_keys": block_keys,
            "block_own": 16 if rows <= 16 or wide else 32 if rows <= 32 else 64,
            "turns": rows <= (32 if head_dim <= 64 else 16),
            "min_keys": min_keys,
            "warps": warps,
            "stages": stages,
        } | settings
        if "splits" not in plan:
            tiles = cls(slots, rows, heads, kv_heads, head_dim, block_rows=plan["block_rows"]).tiles
            # Programs of eight warps have a multiprocessor's registers to themselves: more would wait for these to end.
            together = processors * (1 if plan["warps"] > 4 else 2)
            plan["splits"] = max(1, min(32, together // (tiles * kv_heads)))
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
    packed: Float[Tensor, "R heads*D"],
    turning: Turning,
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
    pdl: bool = False,
) -> None:
    """Write the rows' attention into `out`, and their keys and values into the cache; padded rows become zeros.

    Args:
        packed: the rows' projections, `[q heads, k heads, v heads] x D`, biases added; rows may be strided. What they
            hold afterwards is of no use.
        turning: what becomes of queries and keys before they meet.
        table: addresses [slots, blocks] int64 of cache blocks in `cache_dtype`, with room for the step's own keys.
        out: rows may be strided, heads and D are dense.
        window: a row sees only keys at positions above its own minus this; 0: all.
        softcap: scores become softcap * tanh(score / softcap); 0: as they are.
        pdl: start before the kernel in front has ended (Hopper).
    """
    if not plan.turns:
        rotate_and_store(
            packed, turning, table, layer, layout, heads=plan.heads, kv_heads=plan.kv_heads, head_dim=plan.head_dim,
            cache_dtype=cache_dtype, pdl=pdl,
        )  # fmt: skip
    attention_kernel[(plan.tiles, plan.kv_heads, plan.splits)](
        packed, out, turning.cosines, turning.query_gain, turning.key_gain, table,
        layout.cached, layout.first_row, layout.row_count, layout.is_chain, layout.table_row, layout.position,
        layout.ancestors, workspace.values, workspace.sums, workspace.arrived,
        plan.slots, plan.rows, packed.stride(0), out.stride(0), table.stride(0), layer, window, plan.splits,
        max(1, plan.min_keys // plan.block_keys), scale, softcap, turning.epsilon,
        SLOTS=_power_of_two(plan.slots), GROUP=plan.group, D=plan.head_dim,
        BLOCK_D=max(16, _power_of_two(plan.head_dim)), BLOCK_M=plan.block_rows, BLOCK_N=plan.block_keys,
        BLOCK_R=plan.block_own, HAS_WINDOW=window > 0, CACHE=TRITON_TYPES[cache_dtype], HAS_SOFTCAP=softcap > 0,
        TURNS=plan.turns, ROTARY=turning.cosines.shape[1], NORM=turning.norms, ADDS_ONE=turning.adds_one,
        num_warps=plan.warps, num_stages=plan.stages, **launch_options(pdl),
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


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

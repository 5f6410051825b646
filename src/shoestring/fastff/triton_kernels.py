"""Triton kernels of the fast feedforward layer's inference (arXiv 2308.14711, 2311.10770), on contiguous tensors.

Two ways through a tree. `path_kernel`: one program a token and tree walks the path, several levels a step (the
rows of a small subtree are read together, so the chain of dependent loads is shorter). Grouped: `route_kernel`
takes the top levels as one dense product, `count_kernel` and `place_kernel` sort tokens by the subtree they reached
(a stable counting sort without atomics), `group_forward_kernel` does a tile of tokens of one subtree densely: its
nodes and the ancestors they share are the columns of one product, masked to each token's path.

Nodes are numbered as in a heap: from 0 in memory, from 1 where children are 2h and 2h + 1. The file imports where
Triton is absent; `launch` then says so.
"""

# ruff: noqa: E741, N803, N806, RET505
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations  # annotations as text: they name Triton, which may be absent

from collections.abc import Callable
from typing import Any

import torch

from shoestring.errors import MissingDependencyError

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only PyTorch
    triton = None

__all__ = [
    "activate",
    "columns_of_group",
    "count_kernel",
    "group_forward_kernel",
    "jit",
    "launch",
    "on_path",
    "path_kernel",
    "place_kernel",
    "route_kernel",
    "slope",
    "tile_of_group",
]


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` that compiles once for all batches, or the function itself where Triton is absent."""
    return function if triton is None else triton.jit(function, do_not_specialize=["tokens", "tiles"])


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any
) -> None:
    """Run a kernel over a grid, on its first tensor's device; an empty grid is no work.

    Raises: MissingDependencyError where Triton is absent.
    """
    if triton is None:
        raise MissingDependencyError("Triton kernels need triton: pip install triton (Linux, a CUDA PyTorch)")
    if not all(grid):
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, num_warps=warps, num_stages=stages, **constants)


@jit
def activate(z, KIND: tl.constexpr):
    """The activation numbered KIND in `functional.ACTIVATIONS`; 0 of 0, NaN of NaN."""
    if KIND == 0:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == 1:  # the tanh of u, by the sigmoid of 2u
        return z * tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    elif KIND == 2:
        return tl.where(z <= 0.0, 0.0, z)
    else:
        return z * tl.sigmoid(z)


@jit
def slope(z, KIND: tl.constexpr):
    """Its derivative."""
    if KIND == 0:  # the normal distribution, and z times its density
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif KIND == 1:
        s = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif KIND == 2:
        return tl.where(z > 0.0, 1.0, 0.0)
    else:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))


@jit
def path_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, y_ptr, tokens,
    E: tl.constexpr, O: tl.constexpr, LEVELS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    PATH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, trees): y[tree, token] (O), the sum over a path. ROWS >= 2^STEP - 1, PATH >= LEVELS."""
    NODES: tl.constexpr = 2**LEVELS - 1
    token = tl.program_id(0).to(tl.int64)
    tree = tl.program_id(1).to(tl.int64)
    x_ptr += token * E
    w_in_ptr += tree * NODES * E
    w_out_ptr += tree * NODES * O
    y_ptr += (tree * tokens + token) * O

    e = tl.arange(0, BLOCK_E)
    if E <= BLOCK_E:
        x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    local = tl.arange(0, ROWS) + 1  # heap numbers within a step's subtree
    below = tl.zeros([ROWS], tl.int32)
    for level in tl.static_range(1, STEP):
        below += (local >= 2**level).to(tl.int32)
    at = tl.arange(0, PATH)
    nodes = tl.zeros([PATH], tl.int32)
    acts = tl.zeros([PATH], tl.float32)
    heap = tl.full((), 1, tl.int32)
    for first in tl.static_range(0, LEVELS, STEP):
        rows = (heap << below) + local - (1 << below) - 1
        valid = (local < 2**STEP) & (first + below < LEVELS)
        row_ptr = w_in_ptr + rows.to(tl.int64)[:, None] * E
        if E <= BLOCK_E:
            w = tl.load(row_ptr + e[None, :], mask=valid[:, None] & (e < E)[None, :], other=0.0)
            z = tl.sum(w.to(tl.float32) * x[None, :], 1)
        else:
            sums = tl.zeros([ROWS, BLOCK_E], tl.float32)
            for start in range(0, E, BLOCK_E):
                inside = start + e < E
                part = tl.load(x_ptr + start + e, mask=inside, other=0.0).to(tl.float32)
                w = tl.load(row_ptr + start + e[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
                sums += w.to(tl.float32) * part[None, :]
            z = tl.sum(sums, 1)
        if BIAS:
            z += tl.load(b_in_ptr + tree * NODES + rows, mask=valid, other=0.0).to(tl.float32)
        here = tl.full((), 1, tl.int32)
        for level in tl.static_range(STEP):
            if first + level < LEVELS:
                chosen = tl.sum(tl.where(local == here, z, 0.0), 0)
                nodes = tl.where(at == first + level, heap - 1, nodes)
                acts = tl.where(at == first + level, chosen, acts)
                right = (chosen > 0).to(tl.int32)
                here = 2 * here + right
                heap = 2 * heap + right

    acts = activate(acts, KIND)
    for start in tl.static_range(0, O, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        w = tl.load(
            w_out_ptr + nodes.to(tl.int64)[:, None] * O + o[None, :],
            mask=(at < LEVELS)[:, None] & (o < O)[None, :],
            other=0.0,
        )
        tl.store(y_ptr + o, tl.sum(acts[:, None] * w.to(tl.float32), 0), mask=o < O)


@jit
def route_kernel(
    x_ptr, w_in_ptr, b_in_ptr, group_ptr, counts_ptr, tokens,
    E: tl.constexpr, LEVELS: tl.constexpr, TOP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, trees): the subtree (of 2^TOP) each token reaches, and how many of the tile reach each."""
    NODES: tl.constexpr = 2**LEVELS - 1
    GROUPS: tl.constexpr = 2**TOP
    tile = tl.program_id(0)
    tree = tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < tokens
    node = tl.arange(0, COLUMNS)
    e = tl.arange(0, BLOCK_E)
    x_ptr += token.to(tl.int64)[:, None] * E
    w_in_ptr += tree * NODES * E + node[None, :] * E
    z = tl.zeros([TILE, COLUMNS], tl.float32)
    for start in range(0, E, BLOCK_E):
        column = start + e
        x = tl.load(x_ptr + column[None, :], mask=inside[:, None] & (column < E)[None, :], other=0.0)
        w = tl.load(
            w_in_ptr + column[:, None], mask=(node < GROUPS - 1)[None, :] & (column < E)[:, None], other=0.0
        )
        z = tl.dot(x, w, z, input_precision=PRECISION)
    if BIAS:
        bias = tl.load(b_in_ptr + tree * NODES + node, mask=node < GROUPS - 1, other=0.0).to(tl.float32)
        z += bias[None, :]
    heap = tl.full([TILE], 1, tl.int32)
    for _ in tl.static_range(TOP):
        chosen = tl.sum(tl.where(node[None, :] == heap[:, None] - 1, z, 0.0), 1)
        heap = 2 * heap + (chosen > 0).to(tl.int32)
    group = heap - GROUPS
    tl.store(group_ptr + tree * tokens + token, group, mask=inside)
    groups = tl.arange(0, GROUPS)
    hits = (groups[None, :] == group[:, None]) & inside[:, None]
    tiles = tl.num_programs(0)
    tl.store(counts_ptr + (tree * tiles + tile) * GROUPS + groups, tl.sum(hits.to(tl.int32), 0))


@jit
def count_kernel(counts_ptr, starts_ptr, tiles, GROUPS: tl.constexpr, TILES: tl.constexpr):
    """Grid (trees,): counts (tiles, GROUPS) become the sums of the tiles before; starts (GROUPS + 1) of the groups."""
    tree = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    counts_ptr += tree * tiles * GROUPS
    sums = tl.zeros([GROUPS], tl.int32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = counts_ptr + tile[:, None] * GROUPS + group[None, :]
        mask = (tile < tiles)[:, None] & (group < GROUPS)[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + sums[None, :], mask=mask)
        sums += tl.sum(counts, 0)
    ends = tl.cumsum(sums, 0)
    starts_ptr += tree * (GROUPS + 1)
    tl.store(starts_ptr + group, ends - sums)
    tl.store(starts_ptr + GROUPS, tl.sum(sums, 0))


@jit
def place_kernel(
    group_ptr, counts_ptr, starts_ptr, order_ptr, tokens, GROUPS: tl.constexpr, TILE: tl.constexpr
):
    """Grid (tiles, trees): order[place] = token, tokens of one group together and in their own order."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    tree = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, TILE)
    token = tile * TILE + local
    inside = token < tokens
    group = tl.load(group_ptr + tree * tokens + token, mask=inside, other=-1)
    earlier = (group[:, None] == group[None, :]) & (local[None, :] < local[:, None])
    group = tl.maximum(group, 0)
    place = tl.load(starts_ptr + tree * (GROUPS + 1) + group)
    place += tl.load(counts_ptr + (tree * tiles + tile) * GROUPS + group) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order_ptr + tree * tokens + place, token, mask=inside)


@jit
def tile_of_group(starts_ptr, index, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """The group, first place and end place of the index-th tile of TILE places, none spanning two groups."""
    group = tl.arange(0, GROUPS)
    first = tl.load(starts_ptr + group)
    last = tl.load(starts_ptr + group + 1)
    tiles = (last - first + TILE - 1) // TILE
    ends = tl.cumsum(tiles, 0)
    which = tl.sum((ends <= index).to(tl.int32), 0)
    mine = group == which
    start = tl.sum(tl.where(mine, first + (index - ends + tiles) * TILE, 0), 0)
    return which, start, tl.sum(tl.where(mine, last, 0), 0)


@jit
def columns_of_group(group, TOP: tl.constexpr, LOW: tl.constexpr, COLUMNS: tl.constexpr):
    """A group's columns: the 2^LOW - 1 nodes of its subtree, then its TOP ancestors.

    Gives per column the node, its level, the heap number within the subtree, the level within it (-1: an ancestor),
    and whether it exists.
    """
    root = group + 2**TOP
    local = tl.arange(0, COLUMNS) + 1
    below = tl.zeros([COLUMNS], tl.int32)
    for level in tl.static_range(1, LOW):
        below += (local >= 2**level).to(tl.int32)
    inside = local < 2**LOW
    up = local - 2**LOW
    valid = inside | (up < TOP)
    heap = tl.where(
        inside, (root << below) + local - (1 << below), root >> tl.maximum(TOP - tl.maximum(up, 0), 0)
    )
    level = tl.where(inside, TOP + below, up)
    return tl.where(valid, heap - 1, 0), tl.where(valid, level, 0), local, tl.where(inside, below, -1), valid


@jit
def on_path(leaf, local, below, valid, LOW: tl.constexpr):
    """Whether columns lie on the path to `leaf` (a heap number at the subtree's lowest level); shapes broadcast."""
    return valid & ((below < 0) | ((leaf >> (LOW - 1 - tl.maximum(below, 0))) == local))


@jit
def group_forward_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, order_ptr, starts_ptr, y_ptr, leaf_ptr, z_ptr,
    E: tl.constexpr, O: tl.constexpr, TOP: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,) of one tree: y[token] (O), added to what is there if ADD; SAVE keeps leaf and z (levels)."""
    LEVELS: tl.constexpr = TOP + LOW
    group, start, end = tile_of_group(starts_ptr, tl.program_id(0), 2**TOP, TILE)
    if group == 2**TOP:
        return
    place = start + tl.arange(0, TILE)
    inside = place < end
    token = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int64)
    node, level, local, below, valid = columns_of_group(group, TOP, LOW, COLUMNS)
    node = node.to(tl.int64)

    z = tl.zeros([TILE, COLUMNS], tl.float32)
    e = tl.arange(0, BLOCK_E)
    for first in range(0, E, BLOCK_E):
        column = first + e
        x = tl.load(
            x_ptr + token[:, None] * E + column[None, :],
            mask=inside[:, None] & (column < E)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_in_ptr + node[None, :] * E + column[:, None],
            mask=valid[None, :] & (column < E)[:, None],
            other=0.0,
        )
        z = tl.dot(x, w, z, input_precision=PRECISION)
    if BIAS:
        z += tl.load(b_in_ptr + node, mask=valid, other=0.0).to(tl.float32)[None, :]

    leaf = tl.full([TILE], 1, tl.int32)
    for _ in tl.static_range(LOW - 1):
        chosen = tl.sum(tl.where(local[None, :] == leaf[:, None], z, 0.0), 1)
        leaf = 2 * leaf + (chosen > 0).to(tl.int32)
    on = on_path(leaf[:, None], local[None, :], below[None, :], valid[None, :], LOW)
    if SAVE:
        tl.store(leaf_ptr + token, leaf, mask=inside)
        tl.store(z_ptr + token[:, None] * LEVELS + level[None, :], z, mask=on & inside[:, None])
    acts = tl.where(on, activate(z, KIND), 0.0).to(w_out_ptr.dtype.element_ty)
    o = tl.arange(0, BLOCK_O)
    for first in range(0, O, BLOCK_O):
        column = first + o
        w = tl.load(
            w_out_ptr + node[:, None] * O + column[None, :],
            mask=valid[:, None] & (column < O)[None, :],
            other=0.0,
        )
        y = tl.dot(acts, w, input_precision=PRECISION)
        at = y_ptr + token[:, None] * O + column[None, :]
        mask = inside[:, None] & (column < O)[None, :]
        if ADD:
            y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, y, mask=mask)

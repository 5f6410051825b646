"""The attention kernel against its plain twin: interpreted on a CPU, compiled where there is a GPU."""

import random

import pytest
import torch
from interpreted_triton import DEVICE

from shoestring.engine.cuda.attention import AttentionPlan, Workspace, attention_twin, tree_attention
from shoestring.engine.cuda.layout import Bucket, DeviceLayout, HostLayout, block_shape, block_table
from shoestring.engine.tokentree import TokenTree


def random_tree(rows: int, seed: int) -> TokenTree:
    draw = random.Random(seed)
    return TokenTree([0] * rows, [-1, *(draw.randrange(row) for row in range(1, rows))])


def step(trees: dict[int, TokenTree], cached: dict[int, int], rows: int, slots: int) -> DeviceLayout:
    layout = DeviceLayout.allocate(Bucket(slots, rows), DEVICE)
    host = HostLayout(layout)
    # Slots lie in the table in another order than in the step.
    host.fill(trees, cached, {slot: len(trees) - 1 - slot for slot in trees})
    host.send()
    return layout


def random_blocks(
    cached: dict[int, int], trees: dict[int, TokenTree], kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[list[torch.Tensor]]:
    blocks = []
    for slot in reversed(list(trees)):
        length = cached[slot] + len(trees[slot])
        pages = [
            torch.randn(block_shape(2, kv_heads, head_dim), device=DEVICE) for _ in range(-(-length // 64))
        ]
        pages[-1][:, :, :, (length - 1) % 64 + 1 :] = float("nan")  # what was never written is not read
        blocks.append([page.to(dtype) for page in pages])
    return blocks


def check(
    trees: dict[int, TokenTree],
    cached: dict[int, int],
    plan: AttentionPlan,
    dtype: torch.dtype = torch.float32,
    **options: float,
) -> None:
    torch.manual_seed(0)
    blocks = random_blocks(cached, trees, plan.kv_heads, plan.head_dim, dtype)
    layout = step(trees, cached, plan.rows, plan.slots)
    packed = torch.randn(plan.rows, 3 * plan.heads, plan.head_dim, device=DEVICE).to(dtype)
    query = packed[:, plan.heads : 2 * plan.heads]  # strided rows
    out = torch.full((plan.rows, plan.heads, plan.head_dim), float("nan"), dtype=dtype, device=DEVICE)
    table = block_table(blocks, 40, DEVICE)
    workspace = Workspace.allocate([plan], DEVICE)
    for _ in range(2):  # the counters are left as they were found
        tree_attention(query, table, 1, layout, plan, workspace, out, cache_dtype=dtype, scale=0.3, **options)
    assert not workspace.arrived.any()
    used = int(layout.row_count.sum())
    assert not out[used:].any(), "padded rows are zeros"
    exact = attention_twin(
        query.double(), [[page.double() for page in row] for row in blocks], 1, layout, scale=0.3, **options
    )
    plain = attention_twin(query, blocks, 1, layout, scale=0.3, **options)
    ours, theirs = (float((result.double() - exact)[:used].abs().max()) for result in (out, plain))
    assert ours <= max(2 * theirs, 1e-6), (ours, theirs)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("merge_last", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (2, 2, 80), (8, 1, 128)])
def test_trees_of_slots_of_different_lengths(
    heads: int, kv_heads: int, head_dim: int, merge_last: bool, splits: int
) -> None:
    if splits == 1 and not merge_last:
        pytest.skip("nothing to merge")
    trees = {0: random_tree(20, 1), 1: TokenTree.chain([0] * 3), 2: random_tree(9, 2)}
    plan = AttentionPlan(
        4, 40, heads, kv_heads, head_dim, splits, block_rows=32, min_keys=64, merge_last=merge_last
    )
    check(trees, {0: 130, 1: 64, 2: 0}, plan)

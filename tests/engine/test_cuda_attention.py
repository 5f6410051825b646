"""The attention kernel against its plain twin: interpreted on a CPU, compiled where there is a GPU."""

import random
from dataclasses import replace

import pytest
import torch
from interpreted_triton import DEVICE

from shoestring.engine.cuda.attention import AttentionPlan, Workspace, attention_twin, tree_attention
from shoestring.engine.cuda.layout import Bucket, DeviceLayout, HostLayout, block_shape, block_table
from shoestring.engine.cuda.rotary import Turning, rotary_table, rotary_twin
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
        for page, states in enumerate(pages):  # what was never written is not read
            states[:, :, :, max(0, cached[slot] - 64 * page) :] = float("nan")
        blocks.append([states.to(dtype) for states in pages])
    return blocks


def in_precision(blocks: list[list[torch.Tensor]], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    return [[page.to(dtype).clone() for page in row] for row in blocks]


def check(
    trees: dict[int, TokenTree],
    cached: dict[int, int],
    plan: AttentionPlan,
    dtype: torch.dtype = torch.float32,
    rotary_dim: int | None = None,
    gains: bool = False,
    **options: float,
) -> None:
    """Attended rows, and the cache's new entries."""
    torch.manual_seed(0)
    dim = plan.head_dim
    blocks = random_blocks(cached, trees, plan.kv_heads, dim, dtype)
    layout = step(trees, cached, plan.rows, plan.slots)
    wide = torch.randn(plan.rows, (plan.heads + 2 * plan.kv_heads + 1) * dim, device=DEVICE).to(dtype)
    frequencies = 1e4 ** -(torch.arange(0, rotary_dim or dim, 2, device=DEVICE) / (rotary_dim or dim))
    norms = [torch.randn(dim, device=DEVICE) for _ in range(2)] if gains else [None, None]
    turning = Turning(rotary_table(frequencies, 1200), *norms, adds_one=gains)
    workspace = Workspace.allocate([plan], DEVICE)
    shape = {"heads": plan.heads, "kv_heads": plan.kv_heads, "head_dim": dim}
    attended, caches = {}, {}
    for kind, precision in (("exact", torch.float64), ("plain", dtype)):
        packed, caches[kind] = wide[:, dim:].to(precision).clone(), in_precision(blocks, precision)
        exactly = replace(turning, cosines=turning.cosines.to(precision))
        rotary_twin(packed, exactly, caches[kind], 1, layout, **shape)
        query = packed[:, : plan.heads * dim].unflatten(1, (plan.heads, dim))
        attended[kind] = attention_twin(query, caches[kind], 1, layout, scale=0.3, **options)
    out = torch.full((plan.rows, plan.heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    attended["ours"], caches["ours"] = out, in_precision(blocks, dtype)
    table = block_table(caches["ours"], 40, DEVICE)
    for _ in range(min(2, plan.splits)):  # the counters are left as they were found
        rows = wide.clone()[:, dim:]  # strided
        tree_attention(
            rows, turning, table, 1, layout, plan, workspace, out, cache_dtype=dtype, scale=0.3, **options
        )
    assert not workspace.arrived.any()
    used = int(layout.row_count.sum())
    assert not out[used:].any(), "padded rows are zeros"
    # float32: exponentials are the hardware's, good to 2 ulp, also in the soft cap; sums of 256 add in another order
    ours, theirs = (error(attended[kind][:used], attended["exact"][:used]) for kind in ("ours", "plain"))
    assert ours <= max(2 * theirs, 8e-6), (ours, theirs)
    pages = {
        kind: torch.cat([page.flatten() for row in some for page in row]) for kind, some in caches.items()
    }
    assert torch.equal(pages["ours"].isnan(), pages["exact"].isnan()), "only the step's own entries are new"
    ours, theirs = (
        error(pages[kind].nan_to_num(), pages["exact"].nan_to_num()) for kind in ("ours", "plain")
    )
    assert ours <= max(2 * theirs, 2e-6), (ours, theirs)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).abs().max())


SLOTS = {0: random_tree(20, 1), 1: TokenTree.chain([0] * 3), 2: random_tree(9, 2)}
CACHED = {0: 130, 1: 64, 2: 0}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "splits"), [(6, 2, 64, 1), (6, 2, 64, 4), (2, 2, 80, 3), (8, 1, 128, 4)]
)
@pytest.mark.parametrize("turns", [True, False])
def test_trees_of_slots_of_different_lengths(
    heads: int, kv_heads: int, head_dim: int, splits: int, turns: bool
) -> None:
    plan = AttentionPlan(4, 40, heads, kv_heads, head_dim, splits, block_rows=32, min_keys=64, turns=turns)
    check(SLOTS, CACHED, plan)


@pytest.mark.parametrize("turns", [True, False])
def test_heads_that_are_normalised_and_turn_in_part(turns: bool) -> None:
    plan = AttentionPlan(4, 40, 6, 2, 96, 2, block_rows=32, block_own=32, min_keys=64, turns=turns)
    check(SLOTS, CACHED, plan, rotary_dim=32, gains=True)
    check(SLOTS, CACHED, replace(plan, head_dim=64), gains=True)


@pytest.mark.parametrize(("window", "block_keys"), [(5, 64), (70, 16), (70, 256)])
def test_windows_count_positions_not_storage(window: int, block_keys: int) -> None:
    # Rows of a tree lie beyond their positions: a chain within it, stored with gaps, needs the positions.
    trees = {0: TokenTree([0] * 24, [-1, 0, *range(22)]), 1: TokenTree.chain([0] * 30), 2: random_tree(9, 2)}
    plan = AttentionPlan(
        4, 64, 2, 1, 64, 3, block_rows=16, block_keys=block_keys, min_keys=max(64, block_keys)
    )
    check(trees, CACHED, plan, window=window)


def test_softcap_and_a_prompt_in_one_step_with_a_tree() -> None:
    trees = {0: TokenTree.chain([0] * 150), 1: random_tree(7, 3)}
    plan = AttentionPlan(2, 160, 3, 1, 64, block_rows=128, block_keys=32)
    for turns in (True, False):
        check(trees, {0: 70, 1: 63}, replace(plan, turns=turns, block_own=32 if turns else 16), softcap=2.0)


@pytest.mark.parametrize("block_keys", [64, 256])
def test_one_row_alone_and_a_step_of_all_lengths_around_a_block(block_keys: int) -> None:
    plan = AttentionPlan(1, 1, 3, 1, 64, 8, min_keys=block_keys, block_keys=block_keys)
    for n in (0, 62, 63, 64, 200, 255, 256, 700):
        check({0: TokenTree.chain([0])}, {0: n}, plan)


@pytest.mark.parametrize("block_own", [32, 64])
def test_trees_around_a_large_block(block_own: int) -> None:
    plan = AttentionPlan(1, 40, 3, 1, 64, 4, min_keys=256, block_keys=256, block_own=block_own)
    for n in (0, 217, 240, 255, 256, 500):
        check({0: random_tree(40, n)}, {0: n}, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_chosen_plans_in_every_precision(head_dim: int, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for slots, rows, lengths, heads, kv_heads, options in (
        (1, 1, (700,), 9, 3, {}),
        (2, 24, (900, 250), 9, 3, {}),
        (4, 64, (900, 64, 0), 8, 1, {"window": 100}),
        (2, 512, (100, 300), 4, 4, {"softcap": 20.0}),
    ):
        share = rows // slots
        trees = {slot: random_tree(share, slot) for slot in range(len(lengths))}
        if rows == 512:
            trees[0] = TokenTree.chain([0] * share)
        plan = AttentionPlan.choose(slots, rows, heads, kv_heads, head_dim, dtype)
        check(trees, dict(enumerate(lengths)), plan, dtype, **options)


def test_plans_have_a_tile_for_every_spread_of_rows() -> None:
    for slots, rows in ((1, 1), (1, 64), (3, 17), (8, 64)):
        for heads, kv_heads in ((9, 3), (32, 8), (8, 8)):
            plan = AttentionPlan.choose(slots, rows, heads, kv_heads, 64, torch.bfloat16)
            draw = random.Random(0)
            for _ in range(50):
                cuts = sorted(draw.randrange(rows + 1) for _ in range(slots))
                counts = [high - low for low, high in zip([0, *cuts], [*cuts, rows], strict=True)][:slots]
                assert sum(-(-count // plan.tile_rows) for count in counts) <= plan.tiles

"""Rotary positions and cache writes, cache moves, and the layout that they read."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from interpreted_triton import DEVICE

from shoestring.engine.cuda.cache_moves import move_rows, move_rows_twin
from shoestring.engine.cuda.layout import (
    Bucket,
    DeviceLayout,
    HostLayout,
    Moves,
    block_shape,
    block_table,
    read_cache,
)
from shoestring.engine.cuda.rotary import Turning, rotary_table, rotary_twin, rotate_and_store
from shoestring.engine.sampling import SamplingOptions, noise_keys
from shoestring.engine.tokentree import NO_TOKEN, TokenTree
from shoestring.errors import RequestError


def random_tree(rows: int, seed: int) -> TokenTree:
    draw = random.Random(seed)
    return TokenTree(list(range(1, rows + 1)), [-1, *(draw.randrange(row) for row in range(1, rows))])


TREES = {7: random_tree(11, 1), 3: TokenTree.chain([5, 6, 7])}
CACHED = {7: 60, 3: 0}
TABLE_ROWS = {7: 0, 3: 1}


def layout_of(rows: int = 16, **fields: object) -> tuple[DeviceLayout, HostLayout]:
    layout = DeviceLayout.allocate(Bucket(3, rows), DEVICE)
    host = HostLayout(layout)
    host.fill(TREES, CACHED, TABLE_ROWS, **fields)  # type: ignore[arg-type]
    host.send()
    return layout, host


def test_layout_says_who_each_row_is() -> None:
    layout, host = layout_of()
    tree = TREES[7]
    assert layout.slot.tolist() == [0] * 11 + [1] * 3 + [-1] * 2
    assert layout.token.tolist() == [*tree.tokens, 5, 6, 7, 0, 0]
    assert layout.position.tolist() == [60 + depth for depth in tree.depths] + [0, 1, 2, 0, 0]
    assert layout.tree_row.tolist()[:14] == [*range(11), *range(3)]
    assert layout.first_row.tolist()[:2] == [0, 11]
    assert layout.row_count.tolist() == [11, 3, 0]
    assert layout.cached.tolist()[:2] == [60, 0]
    assert layout.is_chain.tolist()[:2] == [0, 1]
    assert layout.table_row.tolist() == [0, 1, -1]
    bits = layout.ancestors[:11].cpu().numpy().view(np.uint8)
    mask = np.unpackbits(bits, axis=1, bitorder="little")[:, :11].astype(bool)
    assert np.array_equal(mask, tree.ancestor_mask().numpy())
    # A smaller step leaves nothing of a larger one behind.
    host.fill({3: TREES[3]}, CACHED, TABLE_ROWS)
    host.send()
    assert layout.slot.tolist() == [0] * 3 + [-1] * 13
    assert layout.row_count.tolist() == [3, 0, 0]


def test_ancestors_of_the_deepest_row_of_256() -> None:
    layout = DeviceLayout.allocate(Bucket(1, 256), "cpu")
    tree = TokenTree([0] * 256, [-1, 0, *range(254)])  # two interleaved chains
    HostLayout(layout).fill({0: tree}, {0: 0}, {0: 0})
    host = HostLayout(layout)
    host.fill({0: tree}, {0: 0}, {0: 0})
    host.send()
    mask = np.unpackbits(layout.ancestors.numpy().view(np.uint8), axis=1, bitorder="little").astype(bool)
    assert np.array_equal(mask, tree.ancestor_mask().numpy())


def test_outputs_carry_their_rows_noise_keys() -> None:
    options = SamplingOptions(temperature=0.7, seed=11)
    layout, _ = layout_of(sampling={7: SamplingOptions(), 3: options}, outputs={7: [0, 10], 3: [2]})
    assert layout.output_row.tolist() == [0, 10, 13, *[-1] * 13]
    assert layout.temperature[:3].tolist() == [0, 0, pytest.approx(0.7)]
    key = int(noise_keys(np.array([options.noise_seed], np.uint64), np.array([3]))[0])
    low, high = int(layout.key_low[2]) & 0xFFFFFFFF, int(layout.key_high[2]) & 0xFFFFFFFF
    assert low | high << 32 == key


def test_what_a_bucket_cannot_hold_is_refused() -> None:
    for fields, trees in (
        ({}, {0: TokenTree.chain([0] * 17)}),
        ({}, dict.fromkeys(range(4), TokenTree.chain([0]))),
        ({"moves": [Moves(0, 0, [9, *range(20, 300)])]}, {0: TokenTree.chain([0])}),
    ):
        host = HostLayout(DeviceLayout.allocate(Bucket(3, 16), "cpu"))
        with pytest.raises(RequestError, match="the bucket has"):
            host.fill(trees, dict.fromkeys(trees, 0), dict.fromkeys(trees, 0), **fields)
    host = HostLayout(DeviceLayout.allocate(Bucket(1, 512), "cpu"))
    with pytest.raises(RequestError, match="257 rows"):
        host.fill({0: TokenTree([0] * 257, [-1] + [0] * 256)}, {0: 0}, {0: 0})


def test_the_native_part_fills_the_same_buffer() -> None:
    pytest.importorskip("shoestring._native")
    buffers = []
    for native in (True, False):
        random.seed(4)
        host = HostLayout(DeviceLayout.allocate(Bucket(3, 96), "cpu"), native=native)
        assert (host._native is not None) == native
        filled = []
        for step in range(40):
            slots = random.sample(range(9), random.randrange(1, 4))
            trees = {slot: _random_tree(random.randrange(1, 33), step % 3 == 0) for slot in slots}
            kept = {slot: sorted(random.sample(range(20), random.randrange(1, 6))) for slot in slots}
            outputs = {
                slot: sorted(random.sample(range(len(tree)), random.randrange(len(tree) + 1)))
                for slot, tree in trees.items()
            }
            firsts = host.fill(
                trees,
                {slot: random.randrange(500) for slot in slots},
                {slot: slot + 1 for slot in slots},
                {slot: SamplingOptions(temperature=0.5 * (step % 4 == 1)) for slot in slots},
                None if step % 5 == 0 else outputs,
                [Moves(slot, 10 * slot, rows) for slot, rows in kept.items() if step % 2],
                {
                    slot: random.sample(range(50), len(tree.embeddings or {}))
                    for slot, tree in trees.items()
                    if tree.embeddings
                },
            )
            filled.append((firsts, host._buffer.clone()))
        buffers.append(filled)
    for (firsts, buffer), (other, twin) in zip(*buffers, strict=True):
        assert firsts == other
        assert torch.equal(buffer, twin)


def _random_tree(rows: int, chain: bool) -> TokenTree:
    parents = [-1, *(row - 1 if chain else random.randrange(row) for row in range(1, rows))]
    own = random.sample(range(1, rows), random.randrange(min(rows, 4)))
    tokens = [NO_TOKEN if row in own else random.randrange(1000) for row in range(rows)]
    return TokenTree(tokens, parents, {row: torch.zeros(8) for row in own} or None)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "gains", "adds_one"),
    [(64, 64, False, False), (80, 32, False, False), (96, 96, True, True)],
)
def test_rotary_writes_queries_and_cache(head_dim: int, rotary_dim: int, gains: bool, adds_one: bool) -> None:
    torch.manual_seed(0)
    heads, kv_heads = 6, 2
    layout, _ = layout_of()
    packed = torch.randn(16, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    cosines = rotary_table(1e4 ** -(torch.arange(0, rotary_dim, 2, device=DEVICE) / rotary_dim), 128)
    norms = [torch.randn(head_dim, device=DEVICE) for _ in range(2)] if gains else [None, None]
    turning = Turning(cosines, *norms, adds_one=adds_one)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    results = []
    for kind in ("kernel", "twin", "exact"):
        dtype = torch.float64 if kind == "exact" else torch.float32
        blocks = [
            [torch.zeros(block_shape(3, kv_heads, head_dim), dtype=dtype, device=DEVICE) for _ in range(2)]
            for _ in range(2)
        ]
        rows = packed.to(dtype).clone()
        if kind == "kernel":
            addresses = block_table(blocks, 2, DEVICE)
            rotate_and_store(rows, turning, addresses, 1, layout, cache_dtype=dtype, **shape)
            assert torch.equal(rows[14:], packed[14:]), "padding is left alone"
        else:
            rotary_twin(rows, replace(turning, cosines=cosines.to(dtype)), blocks, 1, layout, **shape)
        results.append(
            torch.cat([rows[:14].flatten(), *(block.flatten() for row in blocks for block in row)]).double()
        )
    kernel, twin, exact = results
    assert (kernel - exact).abs().max() <= max(2 * (twin - exact).abs().max(), 1e-6)
    key, _ = read_cache(blocks[0], 1, 71)
    assert key[:, :60].abs().max() == 0
    assert (key[:, 60:] != 0).all(), "rows cross into the second block"


def test_moves_keep_what_an_accepted_path_says() -> None:
    torch.manual_seed(0)
    path = [0, 1, 5, 6, 9]
    long = sorted(random.Random(0).sample(range(1, 200), 150))
    moves = [Moves(1, 61, path), Moves(0, 3, range(40)), Moves(0, 30, long)]
    layout, _ = layout_of(moves=moves)
    assert layout.move_count.tolist() == [3, 150, 0], "what lies where it belongs is not moved"
    for head_dim in (64, 80):
        blocks = [
            [torch.randn(block_shape(2, 1, head_dim), device=DEVICE) for _ in range(4)] for _ in range(2)
        ]
        before = [torch.cat(row, dim=3) for row in blocks]
        expected = [[block.clone() for block in row] for row in blocks]
        move_rows(
            block_table(blocks, 5, DEVICE),
            layout,
            layers=2,
            kv_heads=1,
            head_dim=head_dim,
            cache_dtype=torch.float32,
        )
        move_rows_twin(expected, layout)
        for row in range(2):
            assert all(map(torch.equal, blocks[row], expected[row]))
        for row, n, kept in ((1, 61, path), (0, 30, long)):
            after = torch.cat(blocks[row], dim=3)
            source = [n + index for index in kept]
            assert torch.equal(after[..., n : n + len(kept), :], before[row][..., source, :])
            assert torch.equal(after[..., :n, :], before[row][..., :n, :])

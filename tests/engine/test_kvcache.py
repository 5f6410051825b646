"""The cache alone, without a model: what is written for a token must be read back for it, whatever happened between."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.engine.attention import StepLayout, active_step
from shoestring.engine.kvcache import KVCache, LayerShapeRecorder, PlaneShape
from shoestring.engine.tokentree import TokenTree

CPU = torch.device("cpu")
# Two layers whose heads and widths differ, and keys and values of different width.
PLANES = {
    (0, "key"): PlaneShape(2, 3, torch.float32, CPU),
    (0, "value"): PlaneShape(2, 5, torch.float32, CPU),
    (1, "key"): PlaneShape(1, 3, torch.float32, CPU),
    (1, "value"): PlaneShape(2, 3, torch.float32, CPU),
}


def mark(plane, shape, token, position):
    """What a token at a position writes into a plane: unlike anything else."""
    generator = torch.Generator().manual_seed(hash((plane, token, position)) % 2**31)
    return torch.randn(shape.heads, shape.width, generator=generator)


def step(cache, trees):
    """Write the trees' rows as a model would; return what each layer reads per slot."""
    cached = {slot: cache.length(slot) for slot in trees}
    for slot, tree in trees.items():
        cache.reserve(slot, len(tree))
    layout = StepLayout.pack(trees, cached, CPU)
    read = {slot: {} for slot in trees}
    with active_step(layout):
        assert cache.get_mask_sizes(layout.total_rows) == (layout.total_keys, 0)
        for layer in (0, 1):
            states = []
            for kind in ("key", "value"):
                shape = PLANES[layer, kind]
                rows = [
                    mark((layer, kind), shape, token, cached[slot] + depth)
                    for slot, tree in trees.items()
                    for token, depth in zip(tree.tokens, tree.depths, strict=True)
                ]
                states.append(torch.stack(rows, dim=1)[None])
            for kind, whole in zip(("key", "value"), cache.update(*states, layer), strict=True):
                for segment in layout.segments:
                    read[segment.slot][layer, kind] = whole[
                        0, :, segment.first_key : segment.first_key + segment.keys
                    ].clone()
    return read


def check(read, tokens):
    """The first keys and values are those of `tokens`."""
    for plane, shape in PLANES.items():
        for position, token in enumerate(tokens):
            assert torch.equal(read[plane][:, position], mark(plane, shape, token, position))


def grow(cache, slot, tokens):
    step(cache, {slot: TokenTree.chain(tokens)})
    cache.commit(slot, tokens, range(len(tokens)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20))
def test_any_committed_paths_of_any_slots_are_read_back(seed):
    chance = random.Random(seed)
    cache, texts = KVCache(PLANES), {}
    for _ in range(chance.randrange(2, 9)):
        if len(texts) < 3 and chance.random() < 0.6:
            slot = chance.choice([slot for slot in range(4) if slot not in texts])
            assert cache.open(slot, []) == 0
            texts[slot] = []
        if not texts:
            continue
        trees = {}
        for slot in chance.sample(sorted(texts), chance.randrange(1, len(texts) + 1)):
            count = chance.randrange(1, 12)
            parents = [-1, *(chance.randrange(row) for row in range(1, count))]
            trees[slot] = TokenTree([chance.randrange(99) for _ in parents], parents)
        read = step(cache, trees)
        for slot, tree in trees.items():
            check(read[slot], texts[slot])
            path = tree.path(chance.randrange(len(tree)))[: chance.randrange(0, 6)]
            cache.commit(slot, [tree.tokens[row] for row in path], path)
            texts[slot] += [tree.tokens[row] for row in path]
            assert cache.tokens(slot) == texts[slot]
        if chance.random() < 0.3:
            slot = chance.choice(sorted(texts))
            length = chance.randrange(len(texts[slot]) + 1)
            cache.rewind(slot, length)
            del texts[slot][length:]
        if chance.random() < 0.2:
            slot = chance.choice(sorted(texts))
            cache.release(slot)
            del texts[slot]
    for slot, text in texts.items():
        check(step(cache, {slot: TokenTree.chain([1])})[slot], text)


def test_growing_keeps_what_is_cached_and_respects_the_limit():
    cache = KVCache(PLANES, limit=700)
    cache.open(0, [])
    text = []
    for length in (200, 100, 150, 249):
        chunk = [(7 * i + length) % 99 for i in range(length)]
        grow(cache, 0, chunk)
        text += chunk
    check(step(cache, {0: TokenTree.chain([1])})[0], text)
    assert cache.nbytes == 700 * 4 * sum(shape.heads * shape.width for shape in PLANES.values())


def test_a_released_sequence_is_taken_over_by_the_prompt_that_continues_it():
    cache = KVCache(PLANES)
    text = list(range(40))
    cache.open(0, text)
    grow(cache, 0, text)
    cache.release(0)
    held = cache.nbytes
    assert cache.open(3, [*text[:30], 98, 97]) == 30
    assert cache.nbytes == held, "nothing new may be allocated"
    check(step(cache, {3: TokenTree.chain([1])})[3], text[:30])


def test_at_least_the_last_token_of_a_prompt_is_left_to_run():
    cache = KVCache(PLANES)
    cache.open(0, [])
    grow(cache, 0, list(range(40)))
    cache.release(0)
    assert cache.open(0, list(range(40))) == 39
    assert cache.length(0) == 39


def test_a_short_common_prefix_is_not_worth_sharing():
    cache = KVCache(PLANES)
    cache.open(0, [])
    grow(cache, 0, list(range(40)))
    assert cache.open(1, [*range(15), 99, 98]) == 0
    assert cache.open(2, [*range(16), 99, 98]) == 16


def test_a_live_sequence_is_copied_from_and_the_two_part():
    cache = KVCache(PLANES)
    text = list(range(40))
    cache.open(0, [])
    grow(cache, 0, text)
    assert cache.open(1, [*text[:25], 98, 97]) == 25
    grow(cache, 1, [98, 97])
    grow(cache, 0, [55])
    read = step(cache, {0: TokenTree.chain([1]), 1: TokenTree.chain([2])})
    check(read[0], [*text, 55])
    check(read[1], [*text[:25], 98, 97])
    cache.release(0)
    check(step(cache, {1: TokenTree.chain([2])})[1], [*text[:25], 98, 97])


def test_the_longest_prefix_wins_whether_live_or_released():
    cache = KVCache(PLANES)
    text = list(range(60))
    for slot, length in ((0, 20), (1, 50), (2, 30)):
        cache.open(slot, [])
        grow(cache, slot, text[:length])
    cache.release(2)
    assert cache.open(3, text) == 50
    check(step(cache, {3: TokenTree.chain([1])})[3], text[:50])


def test_only_the_most_recently_used_sequences_are_retained():
    cache = KVCache(PLANES)
    texts = [[100 * index + i for i in range(20)] for index in range(7)]
    for slot, text in enumerate(texts):
        cache.open(slot, text)
        grow(cache, slot, text)
    one = cache.nbytes // 7
    for slot in range(7):
        cache.release(slot)
    assert cache.nbytes == 4 * one
    assert cache.open(0, [*texts[2], 1]) == 0, "the oldest made room"
    assert cache.open(1, [*texts[6], 1]) == 20
    cache.clear()
    assert cache.nbytes == 2 * one


def test_a_slot_cannot_be_opened_twice():
    cache = KVCache(PLANES)
    cache.open(0, [])
    with pytest.raises(ValueError, match="slot 0 is open already"):
        cache.open(0, [])


def test_the_cache_works_only_inside_a_step():
    with pytest.raises(RuntimeError, match="outside a step"):
        KVCache(PLANES).update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 5), 0)


def test_the_recorder_notes_each_layers_shapes():
    recorder = LayerShapeRecorder()
    for layer in (0, 1):
        key, value = (PLANES[layer, kind] for kind in ("key", "value"))
        recorder.update(
            torch.zeros(1, key.heads, 4, key.width), torch.zeros(1, value.heads, 4, value.width), layer
        )
    assert recorder.planes == PLANES

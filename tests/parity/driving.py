"""The same steps through two runners, all their results compared."""

import random

import pytest
import torch
from architectures import VOCABULARY
from comparing import GREEDY, SAMPLED

from shoestring.engine.runner import Outputs, Runner
from shoestring.engine.tokentree import NO_TOKEN, TokenTree

TOLERANCE = 1e-4


def random_tree(chance: random.Random, rows: int, kind: str) -> TokenTree:
    parents = [-1]
    for row in range(1, rows):
        nearest = row - 1 if kind == "chain" else chance.randrange(max(0, row - 9), row)
        parents.append(nearest if kind == "chain" or chance.random() < 0.5 else chance.randrange(row))
    return TokenTree([chance.randrange(VOCABULARY) for _ in parents], parents)


def assert_same_results(trees, expected, actual, layers=()):
    """Every row's logits, hidden states, next token, arg-max and top-k; tokens may swap only where they tie."""
    for slot, tree in trees.items():
        for row in range(len(tree)):
            theirs, ours = expected[slot], actual[slot]
            logits = theirs.logits(row)
            torch.testing.assert_close(ours.logits(row).cpu(), logits, atol=TOLERANCE, rtol=0)
            for layer in layers:
                torch.testing.assert_close(
                    ours.hidden_state(row, layer).cpu(),
                    theirs.hidden_state(row, layer),
                    atol=TOLERANCE,
                    rtol=1e-4,
                )
            top = logits.topk(4).values
            if float((top[:-1] - top[1:]).min()) > 2 * TOLERANCE:
                assert ours.argmax(row) == theirs.argmax(row)
                assert ours.top_k(row) == theirs.top_k(row)
                assert ours.log_probability(row, 5) == pytest.approx(theirs.log_probability(row, 5), abs=1e-3)


def assert_driven_alike(runners: list[Runner], script, layers=()) -> None:
    """Put the same steps through both runners and compare all rows; keep a random path of each tree."""
    chance = random.Random(7)
    want = Outputs(logits=True, top_k=3, hidden_states=layers)
    slots = {slot for trees in script for slot in trees}
    for slot in slots:
        for runner in runners:
            runner.open(slot, SAMPLED if slot % 2 else GREEDY)
    try:
        for trees in script:
            expected, actual = (runner.step(trees, want) for runner in runners)
            assert_same_results(trees, expected, actual, layers)
            paths = {
                slot: tree.path(chance.randrange(len(tree) // 2, len(tree))) for slot, tree in trees.items()
            }
            for runner in runners:
                runner.commit(paths)
    finally:
        for slot in slots:
            for runner in runners:
                runner.release(slot)


def assert_embeddings_and_masks_alike(runners: list[Runner]) -> None:
    """A row with its own embedding, and one that only some tokens may follow."""
    vector = torch.randn(64, generator=torch.Generator().manual_seed(2))
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[[11, 23, 42]] = True
    tree = TokenTree([3, NO_TOKEN, 5], [-1, 0, 1], embeddings={1: vector}, allowed={2: allowed})
    results = []
    for runner in runners:
        runner.open(0, GREEDY)
        results.append(runner.step({0: tree}, Outputs(logits=True, top_k=3))[0])
        runner.release(0)
    assert_same_results({0: tree}, {0: results[0]}, {0: results[1]})
    assert results[1].next_token(2) == results[0].next_token(2)
    assert results[1].next_token(2) in (11, 23, 42)

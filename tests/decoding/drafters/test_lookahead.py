"""Lookahead decoding against a straightforward implementation of the paper's section 3 on plain forward passes."""

import random

import pytest
import torch
from architectures import VOCABULARY
from comparing import GREEDY, SAMPLED, plain_model, prompt_of, request, run, runner_of
from hypothesis import given
from hypothesis import strategies as st

from shoestring.decoding.decode import decode
from shoestring.decoding.drafters.lookahead import LookaheadDrafter, NgramPool
from shoestring.decoding.drafters.protocol import ROOT, Context, Draft

PROMPT = prompt_of(15)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=30))
def test_the_pool_keeps_the_most_recently_seen_continuations(guesses, seen):
    pool = NgramPool(guesses)
    reference = {}
    for token, following in seen:
        pool.add(token, (following, 0))
        recent = reference.setdefault(token, [])
        if (following, 0) in recent:
            recent.remove((following, 0))
        recent.insert(0, (following, 0))
        del recent[guesses:]
    for token in range(3):
        assert pool.continuations(token) == reference.get(token, [])


class Paper:
    """The paper's algorithm, greedy: each window cell and each guess is a plain pass over its own sequence."""

    def __init__(self, model, window, ngram, guesses, prompt, seed=0):
        self.model, self.columns, self.levels, self.guesses = model, window, ngram - 1, guesses
        self.tokens = list(prompt)
        chance = random.Random(seed)
        self.window = [chance.choices(prompt, k=window) for _ in range(self.levels)]
        self.pool = {}

    def after(self, *following):
        with torch.no_grad():
            return int(self.model(torch.tensor([[*self.tokens, *following]])).logits[0, -1].argmax())

    def step(self):
        """One step: its emitted tokens."""
        window = self.window
        window[0][0] = self.tokens[-1]
        # Lookahead branch: (level l, column i) sees level 0 up to column i, then levels 1..l of column i.
        new = [
            self.after(
                *window[0][1 : column + 1], *(window[level][column] for level in range(1, self.levels))
            )
            for column in range(self.columns)
        ]
        # Verification branch: the guess that agrees longest.
        emitted = [self.after()]
        for guess in self.pool.get(self.tokens[-1], []):
            right = []
            for token in guess:
                if token != self.after(*right):
                    break
                right.append(token)
            if len(right) >= len(emitted):
                emitted = [*right, self.after(*right)]
        for column in range(self.columns):
            gram = (*(window[level][column] for level in range(1, self.levels)), new[column])
            recent = self.pool.setdefault(window[0][column], [])
            if gram in recent:
                recent.remove(gram)
            recent.insert(0, gram)
            del recent[self.guesses :]
        self.window = [*window[1:], new]
        self.tokens += emitted
        self.window[0] = [self.tokens[-1], *self.window[0][1:]]
        return emitted


@pytest.mark.parametrize("size", [(4, 4, 3), (5, 3, 5), (3, 2, 2), (1, 3, 2), (6, 5, 6)], ids=str)
def test_windows_pool_and_steps_are_those_of_the_paper(size):
    paper = Paper(plain_model("llama"), *size, PROMPT)
    drafter = LookaheadDrafter(*size)
    steps = {}
    for emission in decode(runner_of("llama"), [request(PROMPT, drafter, most=24)]):
        steps.setdefault(emission.step, []).append(emission.token)
        if emission.finish_reason:
            break
    for number in range(len(steps) - 1):
        assert steps[number] == paper.step(), f"step {number}"
    assert drafter._window == paper.window
    pooled = {token: drafter._pool.continuations(token) for token in drafter._pool._pool}
    assert pooled == paper.pool


def cells(drafter, draft):
    """Each window cell's tokens from the root."""
    branches = {}
    for level, nodes in enumerate(drafter._nodes):
        for column, node in enumerate(nodes):
            path = []
            while node != ROOT:
                path.insert(0, draft.tokens[node])
                node = draft.parents[node]
            branches[level, column] = path
    return branches


def test_a_window_cells_depth_is_its_level_plus_its_column():
    drafter = LookaheadDrafter(5, 4, 3)
    drafter.begin(PROMPT)
    draft = drafter.propose(Context(list(PROMPT), len(PROMPT)), 100)
    window = drafter._window
    for (level, column), path in cells(drafter, draft).items():
        assert len(path) == level + column
        above = [window[step][column] for step in range(1, level + 1)]
        assert path == [*window[0][1 : column + 1], *above]
    assert len(draft) <= (5 + 3) * 3
    assert draft.wanted == draft.read_only == {node for node in drafter._nodes[-1] if node != ROOT}


def test_keeping_the_window_asks_for_every_rows_token():
    drafter = LookaheadDrafter(5, 4, 3, keep_window=True)
    drafter.begin(PROMPT)
    draft = drafter.propose(Context(list(PROMPT), len(PROMPT)), 100)
    assert draft.wanted is None
    assert not draft.read_only


def test_the_prompt_pool_holds_every_ngram_of_the_text():
    drafter = LookaheadDrafter(2, 4, 9, prompt_pool=True)
    text = [1, 2, 3, 4, 1, 2, 3, 9, 1]
    drafter.begin(text)
    draft = drafter.propose(Context(text, len(text)), 100)
    guesses = Draft.of(drafter._pool.continuations(1))
    assert drafter._pool.continuations(1) == [(2, 3, 9), (2, 3, 4)]
    assert draft.tokens[: len(guesses)] == guesses.tokens == [2, 3, 9, 4]


class Watching(LookaheadDrafter):
    """Notes which drafts it observes as they were proposed."""

    def observe(self, step):
        whole = len(step.draft) == len(self._draft)
        before = [list(level) for level in self._window]
        super().observe(step)
        self.seen.append((whole, before != self._window))

    seen: list


def test_near_the_contexts_end_the_window_is_clipped_and_stands_still():
    model = runner_of("llama")
    prompt = prompt_of(model.max_positions - 12, seed=8)
    expected = run(model, [request(prompt, most=20)])[0]
    drafter = Watching(5, 4, 4)
    drafter.seen = []
    assert run(model, [request(prompt, drafter, most=20)])[0] == expected
    assert {whole for whole, _ in drafter.seen} == {True, False}
    assert all(moved == whole for whole, moved in drafter.seen)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_drafter_used_again_drafts_as_a_new_one(sampling):
    def steps(drafter):
        emissions = decode(runner_of("llama"), [request(PROMPT, drafter, sampling, most=16)])
        return [(emission.token, emission.step) for emission in emissions]

    fresh = LookaheadDrafter(4, 3, 4, prompt_pool=True, keep_window=True)
    used = LookaheadDrafter(4, 3, 4, prompt_pool=True, keep_window=True)
    run(runner_of("llama"), [request(prompt_of(30, seed=77, vocabulary=VOCABULARY), used, most=16)])
    assert steps(used) == steps(fresh)

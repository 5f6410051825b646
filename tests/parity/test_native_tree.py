"""A native draft on its way through a step against the same one as lists: tree, layout, walk, and what it teaches."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.decoding.drafters.guesses import PlainGuesses, make_guesses
from shoestring.decoding.drafters.planned import PlannedDraft
from shoestring.decoding.drafters.protocol import ROOT, Draft
from shoestring.decoding.drafters.rates import AcceptanceRates, drafting_part
from shoestring.decoding.verify import verify
from shoestring.engine.cuda.layout import Bucket, DeviceLayout, HostLayout
from shoestring.engine.cuda.own_rows import OwnRows
from shoestring.engine.tokentree import NativeTree, TokenTree
from shoestring.errors import RequestError

pytestmark = pytest.mark.skipif(drafting_part() is None, reason="the native part is not installed")

VOCABULARY = 6
with torch.inference_mode():
    VECTORS = list(torch.randn(3, 4).clone().unbind())


def plan(guesses, chance, most=24):
    seconds = np.cumsum([1.0, *(chance.choice([0.0, 0.0, 0.02]) for _ in range(most))])
    return guesses.draft(most, 0.01, [[1, 2], [3]], seconds, len(VECTORS), 0.001)


def some_draft(seed):
    """A native draft of a random text, and the plain twin's."""
    chance = random.Random(seed)
    text = chance.choices(range(VOCABULARY), k=chance.randint(2, 40))
    both = []
    for native in (True, False):
        guesses = make_guesses(AcceptanceRates(native=native), 4)
        assert isinstance(guesses, PlainGuesses) is not native
        guesses.extend(text)
        both.append(PlannedDraft(plan(guesses, random.Random(seed)), VECTORS, 4))
    return chance, text, *both


class Results:
    """Next tokens that are known anyway, or drawn when asked for."""

    def __init__(self, tokens, drawn):
        self._tokens, self._drawn = tokens, drawn

    def has(self, row):
        return True

    def next_token(self, row):
        if self._tokens[row] < 0:
            raise ArithmeticError
        return self._tokens[row]

    def drawn(self):
        return np.array(self._tokens, np.int32) if self._drawn else None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30))
def test_a_native_draft_is_the_plain_ones_twin(seed):
    _, text, native, plain = some_draft(seed)
    assert len(native) == len(plain)
    for name in ("tokens", "parents", "owners", "expected"):
        assert getattr(native, name) == getattr(plain, name), name
    assert list(native.embeddings) == list(plain.embeddings)
    assert all(native.embeddings[row] is plain.embeddings[row] for row in plain.embeddings)
    assert [native.chain(node) for node in range(ROOT, len(plain))] == [
        plain.chain(node) for node in range(ROOT, len(plain))
    ]
    for vocabulary in (1, 3, VOCABULARY):
        listed = Draft(plain.tokens, plain.parents, plain.embeddings)
        assert native.fits(vocabulary) == plain.fits(vocabulary) == listed.fits(vocabulary)
    trees = [native.tree(text[-1:]), plain.tree(text[-1:])]
    assert isinstance(trees[0], NativeTree) is (len(native) > 0)
    assert not isinstance(trees[1], NativeTree)
    for name in ("tokens", "parents", "depths", "children", "is_chain"):
        assert list_or_bool(getattr(trees[0], name)) == list_or_bool(getattr(trees[1], name)), name
    assert (trees[0].embeddings or {}).keys() == (trees[1].embeddings or {}).keys()
    rows = range(len(trees[1]))
    assert trees[0].tokens_of(rows) == trees[1].tokens_of(rows)
    assert not isinstance(native.tree(text[-2:]), NativeTree), "a prompt's tokens come with it"
    assert native.tree(text[-2:]).tokens == plain.tree(text[-2:]).tokens


def list_or_bool(value):
    return value if isinstance(value, bool) else list(value)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30))
def test_it_is_walked_along_as_lists_are(seed):
    chance, text, native, plain = some_draft(seed)
    tokens = chance.choices([*range(VOCABULARY), -1], [4] * VOCABULARY + [1], k=len(plain) + 1)
    for row in range(len(plain) + 1):  # mostly along the tree
        below = [node for node in range(len(plain)) if plain.parents[node] + 1 == row]
        if below and chance.random() < 0.8:
            tokens[row] = plain.tokens[chance.choice(below)]
    found = []
    for draft in (native, plain):
        for drawn in (True, False):
            try:
                found.append(verify(draft.tree(text[-1:]), Results(tokens, drawn)))
            except ArithmeticError:
                found.append(None)
    assert found == [found[0]] * 4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_it_is_laid_out_as_lists_are(seed):
    _, text, native, plain = some_draft(seed)
    buffers = []
    for draft, by_native in ((native, True), (native, False), (plain, True)):
        trees = {0: draft.tree(text[-1:]), 3: TokenTree.chain([1, 2]), 2: draft.tree(text[-1:])}
        host = HostLayout(DeviceLayout.allocate(Bucket(4, 64), "cpu"), native=by_native)
        own = OwnRows(torch.zeros(16, 4))
        for _ in range(2):  # the second time places are known
            places = own.place(trees)
        cached = {0: 100, 2: 7, 3: 0}
        firsts = host.fill(trees, cached, {0: 1, 2: 0, 3: 2}, None, None, (), places)
        buffers.append((firsts, {name: host[name].copy() for name in Bucket(4, 64).sections()}))
    for firsts, fields in buffers[1:]:
        assert firsts == buffers[0][0]
        rows = sum(map(len, trees.values()))
        for name, values in fields.items():
            if name == "ancestors":  # chains have none
                branching = [row for slot, first in firsts.items() if not trees[slot].is_chain
                             for row in range(first, first + len(trees[slot]))]  # fmt: skip
                assert np.array_equal(values[branching], buffers[0][1][name][branching])
            else:
                assert np.array_equal(values, buffers[0][1][name]), name
        assert (fields["embedded"][:rows] > 0).sum() == 2 * len(native.embeddings)


def test_a_step_that_does_not_fit_says_what():
    _, text, native, _ = some_draft(3)
    assert len(native) > 8
    host = HostLayout(DeviceLayout.allocate(Bucket(1, 8), "cpu"))
    tree = native.tree(text[-1:])
    with pytest.raises(RequestError, match=f"1 slots with {len(tree)} rows"):
        host.fill({0: tree}, {0: 0}, {0: 0}, own={0: [0, 1, 2]})


@pytest.mark.parametrize("seed", range(8))
def test_it_is_learned_from_as_lists_are(seed):
    chance = random.Random(seed)
    text = chance.choices(range(VOCABULARY), k=30)
    made = []
    for as_lists in (False, True):
        rates = AcceptanceRates(native=True)
        guesses = make_guesses(rates, 4)
        guesses.extend(text)
        draft = plan(guesses, random.Random(seed))
        likely = np.array(
            [random.Random(seed + row).sample(range(VOCABULARY), 3) for row in range(len(draft) + 1)]
        )
        given_draft = SimpleNamespace(tokens=draft.tokens, parents=draft.parents) if as_lists else draft
        accepted = [0] if len(draft) and draft.tokens[0] >= 0 else []
        guesses.observe([1, 2], [[1, 2], [3]], given_draft, accepted, likely.astype(np.int32))
        guesses.extend([1, 2])
        made.append(guesses.grow(40, 0.0, [], None))
    assert made[0] == made[1]

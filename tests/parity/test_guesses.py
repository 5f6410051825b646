"""The native guesses against their plain twin: the same drafts, node by node and chance by chance."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.decoding.drafters.datastore import Datastore
from shoestring.decoding.drafters.guesses import PlainGuesses, make_guesses, plan_rows
from shoestring.decoding.drafters.protocol import ROOT
from shoestring.decoding.drafters.rates import SOURCES, AcceptanceRates, drafting_part
from shoestring.decoding.tune import best_rows
from shoestring.engine.tokentree import NO_TOKEN

pytestmark = pytest.mark.skipif(drafting_part() is None, reason="the native part is not installed")

LONGEST = 4
PRIORS = {("pass", 1, 0): 0.45, ("pass", 2, 0): 0.2}


def pair(known=None, texts=None):
    made = []
    for native in (False, True):
        rates = AcceptanceRates(PRIORS, native=native)
        guesses = make_guesses(rates, LONGEST)
        assert isinstance(guesses, PlainGuesses) is not native
        if known is not None:
            guesses.set_known(known)
        if texts is not None:
            datastore = Datastore(texts, LONGEST)
            guesses.set_datastore(datastore.native if native else datastore)
        made.append((rates, guesses))
    return made


def rows_of(successors):
    return np.array(successors, np.int32)


def rows_below(tokens, parents):
    return SimpleNamespace(tokens=tokens, parents=parents)


def grown(guesses, most, least, predictions, seconds=None):
    tokens, parents, sources, chances = guesses.grow(most, least, predictions, seconds)
    return list(tokens), list(parents), list(sources), list(chances)


def drafted(guesses, most, *arguments):
    """A draft, whose look-ahead rows stand where its pairs say."""
    draft = guesses.draft(most, *arguments)
    tokens, parents, sources, chains = map(list, (draft.tokens, draft.parents, draft.sources, draft.chains))
    expected = draft.expected
    assert expected >= 1
    assert len(tokens) == len(parents) == len(sources) <= max(most, 0)
    row = kept = len(tokens) - sum(rows for _, rows in chains)
    assert NO_TOKEN not in tokens[:kept]
    for node, rows in chains:
        assert ROOT <= node < kept
        assert parents[row : row + rows] == [node, *range(row, row + rows - 1)]
        row += rows
    assert tokens[kept:] == [NO_TOKEN] * (row - kept)
    assert sources[kept:] == [len(SOURCES)] * (row - kept)
    return tokens, parents, sources, chains, expected


def some_seconds(chance, most):
    """Of a step with 0, 1, ..., `most` rows: at times flat, at times in proportion, with steps."""
    more = chance.choice([[0.0], [0.25], [1.0], [0.0, 0.1], [0.0, 0.0, 0.0, 2.0], [0.01, 0.3, 0.5]])
    return np.cumsum([1.0, *(chance.choice(more) for _ in range(max(0, most)))])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.integers(2, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0, 1, 3, 80]),
    st.sampled_from([0.0, 0.01, 0.2]),
)
def test_both_grow_the_same_trie_while_a_text_goes_on(seed, vocabulary, known, ahead, stored, least):
    chance = random.Random(seed)

    def some(count):
        return chance.choices(range(vocabulary), k=count)

    def successors():
        return chance.sample(range(vocabulary), min(3, vocabulary))

    table = (
        np.array([successors() for _ in range(vocabulary - 1)], np.int32).reshape(vocabulary - 1, -1)
        if known
        else None
    )
    made = pair(table, None if stored is None else np.array(some(stored), np.int32))
    text = some(chance.randint(1, 20))
    for _ in range(6):
        predictions = [successors() for _ in range(chance.randint(0, 3))] if ahead else []
        most = chance.randint(0, 24)
        for _, guesses in made:
            guesses.extend(text[len(guesses) :])
        drafts = [grown(guesses, most, least, predictions) for _, guesses in made]
        assert drafts[0] == drafts[1]
        seconds = some_seconds(chance, most)
        stopped = [grown(guesses, most, least, predictions, seconds) for _, guesses in made]
        assert stopped[0] == stopped[1]
        rows = len(stopped[0][0])
        assert stopped[0] == tuple(column[:rows] for column in drafts[0])
        assert best_rows(stopped[0][3], seconds) == best_rows(drafts[0][3], seconds)
        for table in (None, seconds):
            arguments = (most, least, predictions, table, chance.randrange(5), chance.choice([0.0, 0.02]))
            both = [drafted(guesses, *arguments) for _, guesses in made]
            assert both[0] == both[1]
        emitted = some(chance.randint(1, 4))
        rows = chance.randint(0, 8)
        nodes = [chance.choice([*range(vocabulary), NO_TOKEN]) for _ in range(rows)]
        parents = [chance.randint(ROOT, row - 1) for row in range(rows)]
        tokens = [row for row in range(rows) if nodes[row] != NO_TOKEN]
        path = sorted(chance.sample(tokens, chance.randint(0, min(2, len(tokens)))))
        width = chance.randint(1, 9)
        likely = rows_of([chance.sample(range(vocabulary), min(width, vocabulary)) for _ in range(rows + 1)])
        for _, guesses in made:
            guesses.observe(emitted, predictions, rows_below(nodes, parents), path, likely)
        text += emitted
    for source in SOURCES:
        for length in range(6):
            for rank in range(4):
                plain, native = (rates.rate((source, length, rank)) for rates, _ in made)
                assert plain == native


@pytest.mark.parametrize(("pairs", "vocabulary", "rows"), [(5, 6, 80), (100, 30, 1500)])
def test_the_oldest_pairs_make_room_in_both(monkeypatch, pairs, vocabulary, rows):
    from shoestring.decoding.drafters import guesses as module

    monkeypatch.setattr(module, "_PAIRS", pairs)
    made = pair()
    chance = random.Random(3)
    for row in range(rows // 2):
        text = chance.choices(range(vocabulary), k=3)
        # Halfway through more successors are remembered than there was room for.
        width = 1 if row < rows // 4 else vocabulary // 2
        likely = rows_of([chance.sample(range(vocabulary), width) for _ in range(2)])
        for _, guesses in made:
            guesses.extend(text[:2])
            guesses.observe([], [], rows_below(text[2:], [ROOT]), [0], likely)
    for last in range(vocabulary**2):
        drafts = []
        for _, guesses in made:
            guesses.extend([last // vocabulary, last % vocabulary])
            drafts.append(grown(guesses, 6, 0.0, []))
        assert drafts[0] == drafts[1]


@pytest.mark.parametrize("threads", [1, 4])
def test_drafts_made_together_are_those_made_one_by_one(threads):
    chance = random.Random(4)
    texts = [chance.choices(range(6), k=chance.randint(1, 60)) for _ in range(11)]
    predictions = [[chance.sample(range(6), 3)] * (index % 3) for index in range(len(texts))]
    limits = (12, 0.01, np.linspace(1.0, 1.5, 13), 2, 0.001)

    def begun():
        rates = AcceptanceRates(PRIORS, native=True)
        made = [make_guesses(rates, LONGEST) for _ in texts]
        for guesses, text in zip(made, texts, strict=True):
            guesses.extend(text[: len(text) // 2])  # the rest is read where they draft together
        return rates, made

    _, single = begun()
    expected = []
    for guesses, text, foreseen in zip(single, texts, predictions, strict=True):
        guesses.extend(text[len(guesses) :])
        most, least, seconds, ahead, value = limits
        expected.append(drafted(guesses, most, least, foreseen, seconds, ahead, value))
    assert sum(bool(tokens) for tokens, *_ in expected) > 8
    for _ in range(20):  # threads come in another order each time
        _, together = begun()
        found = drafting_part().draft_together(
            [*zip(together, texts, predictions, strict=True)], *limits, threads
        )
        fields = ("tokens", "parents", "sources", "chains")
        assert [(*(list(getattr(one, name)) for name in fields), one.expected) for one in found] == expected
        assert [len(guesses) for guesses in together] == [*map(len, texts)]
    assert drafting_part().draft_together([], *limits, threads) == []
    _, made = begun()
    too_many = [[[*range(40)]] if index == 7 else [] for index in range(len(texts))]
    with pytest.raises(IndexError, match="no such kind of guess"):
        drafting_part().draft_together([*zip(made, texts, too_many, strict=True)], *limits, threads)


def test_growth_ends_where_nothing_more_can_pay():
    for _, guesses in pair():
        guesses.extend([1, 2, 3] * 4)
        guesses.observe([], [], rows_below([1, 2], [ROOT, ROOT]), [], rows_of([[5, 6, 7, 8]] * 3))
        assert len(grown(guesses, 40, 0.0, [])[0]) == 40
        assert 0 < len(grown(guesses, 40, 0.0, [], np.linspace(1.0, 5.0, 41))[0]) < 12
        assert not grown(guesses, 40, 0.0, [], np.linspace(1.0, 41.0, 41))[0], "a row costs as much as a step"


def test_what_was_forgotten_is_not_drafted():
    for _, guesses in pair():
        guesses.extend([1, 2, 1, 2])
        guesses.observe([], [], rows_below([], []), [], rows_of([[7]]))
        assert 7 in grown(guesses, 8, 0.0, [])[0]
        guesses.forget()
        guesses.extend([1, 2])
        assert grown(guesses, 8, 0.0, []) == ([], [], [], [])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 1 << 30), st.integers(0, 30), st.integers(0, 5), st.sampled_from([0.0, 0.002, 0.05]),
    st.integers(-1, 80), st.booleans(), st.booleans(),
)  # fmt: skip
def test_both_plan_the_same_rows(seed, nodes, ahead, least, most, costs, coarse):
    chance = random.Random(seed)

    def number():
        return chance.choice([0.125, 0.25, 0.5]) if coarse else chance.random()  # coarse ones tie

    parents, chances, left = [], [], {-1: 1.0}
    for node in range(nodes):  # siblings share their parent's chance
        parent = chance.choice(list(left))
        mine = left[parent] * number()
        left[parent] -= mine
        left[node] = mine
        parents.append(parent)
        chances.append(mine)
    order = sorted(range(nodes), key=lambda node: -chances[node])  # stable: parents stay in front
    number_of = {-1: -1} | {node: index for index, node in enumerate(order)}
    parents = [number_of[parents[node]] for node in order]
    chances = [chances[node] for node in order]
    gains = sorted((number() for _ in range(ahead)), reverse=True)
    seconds = some_seconds(chance, most) if costs else None
    kept, chains = plan_rows(parents, chances, gains, least, most, seconds)
    assert drafting_part().plan_rows(parents, chances, gains, least, most, seconds) == (kept, chains)
    assert kept + sum(count for _, count in chains) <= max(most, 0)
    assert all(-1 <= node < kept and 0 < count <= ahead for node, count in chains)
    if not costs and most >= nodes * (1 + ahead) + ahead:
        assert kept == nodes, "rows that cost nothing are all taken"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=120), st.lists(st.integers(0, 4), max_size=9), st.integers(2, 7))
def test_both_find_the_same_in_a_datastore(texts, tail, longest):
    datastore = Datastore(np.array(texts, np.int32), longest)
    length, tokens = datastore.after(tail)
    assert datastore.native.after(tail) == (length, tokens)
    assert len(set(tokens)) == len(tokens) <= 8
    suffix = tail[len(tail) - length :]
    followers = [
        texts[end] for end in range(length, len(texts)) if length and texts[end - length : end] == suffix
    ]
    assert set(tokens) <= set(followers)
    assert bool(tokens) == bool(followers) == (length >= 2)
    if len(followers) <= 8:
        assert sorted(tokens) == sorted(set(followers))
        assert [followers.count(token) for token in tokens] == sorted(
            map(followers.count, tokens), reverse=True
        )
    if 0 < length < min(len(tail), longest):
        longer = tail[len(tail) - length - 1 :]
        assert all(texts[end - length - 1 : end] != longer for end in range(length + 1, len(texts)))


def test_a_datastore_outlives_its_python_side():
    (_, plain), (_, native) = pair(texts=np.array([1, 2, 3, 1, 2, 3], np.int32))
    for guesses in (plain, native):
        guesses.extend([9, 1, 2])
        assert grown(guesses, 2, 0.0, [])[0] == [3, 1]

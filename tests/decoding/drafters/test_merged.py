from types import SimpleNamespace

import numpy as np
import pytest
from comparing import FLAT_COST, generate, plain_model, prompt_of, request, run, runner_of
from hypothesis import given
from hypothesis import strategies as st

from shoestring.decoding.decode import decode
from shoestring.decoding.drafters.datastore import Datastore
from shoestring.decoding.drafters.guesses import PlainGuesses
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.protocol import Context, StepObservation
from shoestring.decoding.drafters.rates import AcceptanceRates, drafting_part
from shoestring.decoding.tune import StepCost
from shoestring.errors import RequestError

DEAR = StepCost((1, 2, 4, 128), (1.0, 5.0, 20.0, 640.0))
TEXT = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 9, 9, 1, 2, 3, 4]


def propose(drafter, tokens, budget=1024, batch=1):
    return drafter.propose(Context(list(tokens), 1, batch), budget)


def test_rates_begin_at_a_prior_and_follow_what_is_seen():
    rates = AcceptanceRates()
    assert rates.rate(("ngram", 4, 0)) > rates.rate(("ngram", 1, 0)) > rates.rate(("ngram", 1, 1)) > 0
    for _ in range(500):
        rates.observe(("ngram", 1, 0), True)
        rates.observe(("ngram", 4, 0), False)
    assert rates.rate(("ngram", 1, 0)) > 0.9
    assert rates.rate(("ngram", 4, 0)) < 0.05
    for _ in range(1500):
        rates.observe(("ngram", 1, 0), False)
    assert rates.rate(("ngram", 1, 0)) < 0.05, "old news must fade"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 20), st.integers(1, 4))
def test_the_draft_is_a_trie_within_the_budget(tokens, budget, batch):
    drafter = MergedDrafter(FLAT_COST)
    drafter.begin(tokens)
    draft = propose(drafter, tokens, budget, batch)
    assert len(draft) <= budget
    assert len(set(zip(draft.parents, draft.tokens, strict=True))) == len(draft)
    assert all(parent < node for node, parent in enumerate(draft.parents))
    assert set(draft.owners) == set(range(len(draft)))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("other", ["alike", "another budget"])
def test_sequences_that_share_a_step_may_be_asked_together(native, other):
    if native and drafting_part() is None:
        pytest.skip("the native part is not installed")
    texts = [TEXT, TEXT[3:], [7], TEXT[:9]]

    def made():
        rates = AcceptanceRates(native=native)
        budgets = [9, 9, 9, 9 if other == "alike" else 2]
        drafters = [MergedDrafter(FLAT_COST, budget, rates=rates) for budget in budgets]
        for drafter, text in zip(drafters, texts, strict=True):
            drafter.begin(text)
        return drafters, [Context(list(text), 1, len(texts)) for text in texts]

    drafters, contexts = made()
    together = MergedDrafter.propose_together(drafters, contexts, 256)
    expected = [drafter.propose(context, 256) for drafter, context in zip(*made(), strict=True)]
    seen = [(list(draft.tokens), list(draft.parents), draft.top_k, draft.expected) for draft in together]
    assert seen == [
        (list(draft.tokens), list(draft.parents), draft.top_k, draft.expected) for draft in expected
    ]
    assert len(together[0]) == 9 > len(together[2])
    assert (len(together[3]) > 2) == (other == "alike")


@pytest.mark.parametrize(("budget", "batch"), [(1, 1), (5, 1), (5, 4), (200, 1), (200, 2)])
def test_a_budget_of_the_users_is_obeyed_whatever_rows_cost(budget, batch):
    # Long enough a text with enough repeats that far more than 128 rows could be drafted.
    text = [token for i in range(60) for token in (1, i % 8, i % 5, i % 3)]
    drafter = MergedDrafter(None, budget)
    drafter.begin(text)
    rates = drafter._rates
    for length in range(1, 5):
        for rank in range(8):
            for _ in range(40):
                rates.observe(("ngram", length, rank), True)
    assert len(propose(drafter, text, budget=1024 // batch, batch=batch)) == budget


def test_without_a_budget_dear_rows_are_not_drafted():
    cheap, dear = MergedDrafter(FLAT_COST), MergedDrafter(DEAR)
    assert len(propose(cheap, TEXT)) >= 3
    assert len(propose(dear, TEXT)) == 0


def test_a_batch_shares_the_rows_that_were_measured():
    small = MergedDrafter(StepCost((1, 8), (1.0, 1.0)))
    assert len(propose(small, TEXT, batch=1)) <= 7
    assert len(propose(small, TEXT, batch=4)) <= 1
    assert len(propose(small, TEXT, batch=8)) == 0


def test_neither_cost_nor_budget_is_an_error():
    with pytest.raises(RequestError, match="needs a budget or the measured cost"):
        MergedDrafter(None)


def test_longest_matches_come_first_and_recycled_successors_fill_up():
    prompt = prompt_of(24)
    answer = generate(plain_model("llama"), prompt, 24)
    drafter = MergedDrafter(FLAT_COST, budget=12)
    emissions = list(decode(runner_of("llama"), [request(prompt, drafter, most=24)]))
    assert [emission.token for emission in emissions] == answer
    drafted = {}
    for emission in emissions:
        for source, (rows, _) in (emission.draft or {}).items():
            drafted[source] = drafted.get(source, 0) + rows
    assert set(drafted) == {"ngram", "recycle"}
    first = emissions[0].draft
    assert set(first) <= {"ngram"}, "nothing is known to recycle yet"


def test_a_drafter_used_again_knows_nothing_of_the_last_text_but_the_rates():
    def steps(drafter):
        emissions = decode(runner_of("llama"), [request(prompt_of(30), drafter, most=14)])
        return [(emission.token, emission.step, emission.draft) for emission in emissions]

    used = MergedDrafter(FLAT_COST, budget=8)
    run(runner_of("llama"), [request(prompt_of(30, seed=5), used, most=14)])
    used._rates = AcceptanceRates()
    assert steps(used) == steps(MergedDrafter(FLAT_COST, budget=8))


def test_a_native_part_older_than_this_leaves_drafting_to_the_plain_twin(monkeypatch):
    native = pytest.importorskip("shoestring._native", reason="built without the native part")
    assert drafting_part() is native
    monkeypatch.delattr(native, "Datastore")
    assert drafting_part() is None
    drafter = MergedDrafter(FLAT_COST)
    assert isinstance(drafter._guesses, PlainGuesses)
    assert len(propose(drafter, TEXT)) >= 3


@pytest.mark.parametrize("native", [False, True])
def test_a_datastore_is_drafted_from_and_learned_of(native):
    rates = AcceptanceRates(native=None if native else False)
    if native and rates.native is None:
        pytest.skip("the native part is not installed")
    texts = np.array([1, 2, 3, 4, 5, 9, 2, 3, 8], np.int32)
    drafter = MergedDrafter(None, 2, rates=rates, datastore=Datastore(texts))
    drafter.begin([7, 1, 2, 3])
    draft = drafter.propose(Context([7, 1, 2, 3], 4), 99)
    assert (draft.tokens, draft.parents) == ([4, 5], [-1, 0]), "behind 1 2 3, not only 2 3"
    assert draft.owners == {0: ["datastore"], 1: ["datastore"]}
    before = rates.rate(("datastore", 3, 0))
    results = SimpleNamespace(top_k_table=lambda rows: np.zeros((len(rows), 8), np.int32))
    drafter.observe(StepObservation(Context([7, 1, 2, 3, 4, 5, 6], 4), draft, [4, 5, 6], [0, 1], results, 1))
    assert rates.rate(("datastore", 3, 0)) > before

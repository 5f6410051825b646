import pytest
import torch
from comparing import untrained
from hypothesis import given
from hypothesis import strategies as st

from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.ngram import NgramDrafter
from shoestring.decoding.drafters.pass_tokens import PassDrafter, TwoCallPassDrafter
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.settings import (
    Auto,
    Autoregressive,
    DraftingEnvironment,
    DraftModel,
    Lookahead,
    Ngram,
    Pass,
    as_decoding,
    describe,
    needs_step_cost,
)
from shoestring.decoding.tune import StepCost
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError

GREEDY = SamplingOptions()
CHEAP = StepCost((1, 64, 128), (1.0, 1.01, 1.02))
DEAR = StepCost((1, 2, 4, 128), (1.0, 2.0, 4.0, 128.0))


def unasked(*_):
    raise AssertionError("this strategy needs no measurement and no second model")


def environment(cost=None, look_ahead=None):
    return DraftingEnvironment((lambda: cost) if cost else unasked, unasked, look_ahead)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("autoregressive", Autoregressive()),
        ("lookahead", Lookahead()),
        ("lookahead()", Lookahead()),
        ("lookahead(window=15,ngram=5,guesses=15)", Lookahead(15, 5, 15)),
        (" Lookahead ( window = 7 , keep_window = true ) ", Lookahead(7, keep_window=True)),
        ("lookahead(prompt_pool=True)", Lookahead(prompt_pool=True)),
        ("lookahead(prompt_pool=false)", Lookahead()),
        ("ngram(longest=3,branches=2)", Ngram(3, branches=2)),
        ("draft_model(model=smollm2-135m)", DraftModel("smollm2-135m")),
        ("draft-model(model='a, b (c).gguf', tokens=3)", DraftModel("a, b (c).gguf", 3)),
        ("auto(budget=none)", Auto()),
        ("AUTO(budget=16)", Auto(16)),
        ("auto(look_ahead=false)", Auto(look_ahead=False)),
        ("pass", Pass()),
        ("pass(two_call=true)", Pass(two_call=True)),
        ("Pass(tokens=4,candidates=1,budget=12)", Pass(tokens=4, candidates=1, budget=12)),
    ],
)
def test_text_is_read(text, settings):
    assert as_decoding(text) == settings


counts = st.integers(1, 99)
strategies = st.one_of(
    st.just(Autoregressive()),
    st.builds(
        Lookahead,
        st.none() | counts,
        st.none() | st.integers(2, 9),
        st.none() | counts,
        prompt_pool=st.booleans(),
        keep_window=st.booleans(),
    ),
    st.builds(Ngram, st.integers(4, 9), st.integers(1, 4), counts, counts),
    st.builds(DraftModel, st.text("ab/.-_ ,=()'0", min_size=1), counts),
    st.builds(Auto, st.none() | counts, st.booleans()),
    st.builds(Pass, st.just(True), st.none() | counts),
    st.builds(Pass, st.just(False), st.none() | counts, st.none() | counts, st.none() | counts),
)


@given(strategies)
def test_a_description_reads_back_as_the_same_settings(settings):
    assert as_decoding(describe(settings)) == settings
    assert as_decoding(settings) is settings


def test_a_drafter_is_taken_as_it_is_and_described_by_its_name():
    drafter = NgramDrafter()
    assert as_decoding(drafter) is drafter
    assert describe(drafter) == "ngram"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lookahed", r"unknown decoding strategy 'lookahed' \(did you mean 'lookahead'\?\); known: auto"),
        ("", "unknown decoding strategy ''"),
        ("lookahead(window=5", "unknown decoding strategy"),
        (
            "lookahead(windw=5)",
            r"lookahead has no option 'windw' \(did you mean 'window'\?\); it has: window,",
        ),
        ("autoregressive(window=5)", "autoregressive has no option 'window'; it has: none"),
        ("lookahead(5)", "cannot read '5' in 'lookahead\\(5\\)'"),
        ("lookahead(window=)", "cannot read 'window='"),
        ("lookahead(window=0)", "lookahead: window is 0; .* at least 1"),
        ("lookahead(ngram=1)", "lookahead: ngram is 1; .* at least 2"),
        ("lookahead(window=true)", "lookahead: window is True"),
        ("lookahead(window=many)", "lookahead: window is 'many'"),
        ("lookahead(window=2.5)", "lookahead: window is 2.5"),
        ("lookahead(prompt_pool=no)", "lookahead: prompt_pool is 'no'; it must be true or false"),
        ("ngram(shortest=5)", r"ngram: shortest is 5, more than longest \(4\)"),
        ("ngram(tokens=-1)", "ngram: tokens is -1"),
        ("auto(budget=0)", "auto: budget is 0"),
        ("auto(look_ahead=1)", "auto: look_ahead is 1; it must be true or false"),
        ("pass(tokens=0)", "pass: tokens is 0; .* at least 1"),
        ("pass(two_call=yes)", "pass: two_call is 'yes'"),
        ("pass(two_call=true,candidates=3)", "pass: candidates belongs to the fused form"),
        ("pass(two_call=true,budget=3)", "pass: budget belongs to the fused form"),
        ("draft_model", r"draft_model needs model: draft_model\(model=...\)"),
        ("draft_model(model=x,tokens=0)", "draftmodel: tokens is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_nearest_name(text, message):
    with pytest.raises(RequestError, match=message):
        as_decoding(text)


@pytest.mark.parametrize("value", [None, 5, object(), {"window": 5}])
def test_other_things_than_strategies_are_refused_by_type(value):
    with pytest.raises(RequestError, match=f"decoding is a {type(value).__name__}"):
        as_decoding(value)


def test_numbers_given_are_obeyed_without_measuring():
    assert Autoregressive().drafter(environment(), GREEDY) is None
    assert isinstance(Lookahead(3, 4, 5).drafter(environment(), GREEDY), LookaheadDrafter)
    assert isinstance(Ngram().drafter(environment(), GREEDY), NgramDrafter)
    assert isinstance(Auto(budget=200).drafter(environment(), GREEDY), MergedDrafter)


def test_lookahead_without_numbers_is_as_large_as_rows_are_cheap():
    def size(cost, **numbers):
        drafter = Lookahead(**numbers).drafter(environment(cost), GREEDY)
        drafter = getattr(drafter, "_drafter", drafter)
        return drafter._columns, drafter._levels + 1, drafter._guesses

    assert size(CHEAP) == (15, 5, 15)
    assert size(DEAR) == (2, 3, 3)
    assert size(DEAR, window=6) == (6, 3, 3)


def test_lookahead_that_does_not_promise_to_pay_is_tried_for_a_shorter_time():
    def tried(cost):
        """Drafting steps of 400, all of which lose: they take half as long again as plain ones for as many tokens."""
        now = [0.0]
        made = environment(cost)
        Lookahead().drafter(made, GREEDY)
        (governor,) = made.governors.values()
        governor._clock = lambda: now[0]
        drafted = 0
        for _ in range(400):
            drafts = governor.drafts()
            drafted += drafts
            now[0] += 1.5 if drafts else 1.0
            governor.ends(1)
        return drafted

    assert tried(CHEAP) > 2 * tried(DEAR) > 0


def test_auto_drafts_only_where_rows_pay():
    assert isinstance(Auto().drafter(environment(CHEAP), GREEDY), MergedDrafter)
    assert Auto().drafter(environment(DEAR), GREEDY) is None


def test_sequences_of_a_model_learn_together_and_models_apart():
    shared = environment(CHEAP)
    one, two = (Auto().drafter(shared, GREEDY) for _ in range(2))
    assert one._rates is two._rates
    assert one.governor is two.governor
    assert Auto().drafter(environment(CHEAP), GREEDY)._rates is not one._rates


def test_pass_takes_as_many_embeddings_as_it_is_told():
    loaded = environment(CHEAP, untrained(5))
    assert isinstance(Pass().drafter(loaded, GREEDY), PassDrafter)
    assert isinstance(
        Pass(two_call=True).drafter(environment(None, untrained(5)), GREEDY), TwoCallPassDrafter
    )
    assert len(Pass(tokens=3, budget=9).drafter(environment(None, untrained(5)), GREEDY)._rows) == 3
    with pytest.raises(RequestError, match="tokens is 6, and 5 look-ahead embeddings are loaded"):
        Pass(tokens=6).drafter(loaded, GREEDY)


def test_without_embeddings_pass_says_how_to_train_them_and_auto_does_without():
    with pytest.raises(RequestError, match=r"shoestring train recipes/pass-smollm2\.yaml"):
        Pass().drafter(environment(CHEAP), GREEDY)
    assert Auto().drafter(environment(CHEAP), GREEDY)._ahead is None
    assert Auto().drafter(environment(CHEAP, untrained()), GREEDY)._ahead is not None
    assert Auto(look_ahead=False).drafter(environment(CHEAP, untrained()), GREEDY)._ahead is None


def test_rates_begin_where_the_training_run_measured_them():
    measured = LookAhead(torch.zeros(2, 4), {"results": {"acceptance": [[0.4, 0.2], [0.1, 0.05]]}})
    rates = environment(CHEAP, measured).rates
    found = [rates.rate(("pass", 1, 0)), rates.rate(("pass", 2, 1))]
    assert found == pytest.approx([0.4, 0.05])


def test_who_needs_the_machine_timed():
    asked = ["lookahead", "auto", "pass", "pass(candidates=1)"]
    unasked = ["autoregressive", "ngram", "pass(two_call=true)", "pass(budget=9)", "auto(budget=9)"]
    assert [needs_step_cost(as_decoding(text)) for text in [*asked, *unasked]] == [True] * 4 + [False] * 5

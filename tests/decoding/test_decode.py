"""The loop on a tiny Llama: what ends a sequence, what is refused, what a batch shares, what is counted."""

import functools

import pytest
import torch
from architectures import ADMITTED, CONTEXT, VOCABULARY
from comparing import (
    GREEDY,
    SAMPLED,
    Branches,
    assert_plain,
    collect,
    generate,
    plain_model,
    prompt_of,
    request,
    run,
    runner_of,
)

from shoestring.decoding import decode as decode_module
from shoestring.decoding.decode import MOST_DRAFT_ROWS, decode
from shoestring.decoding.drafters.draft_model import DraftModelDrafter
from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.drafters.ngram import NgramDrafter
from shoestring.decoding.governor import Governor
from shoestring.decoding.stopping import StopChecker
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.runner import NEXT_TOKENS
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError

PROMPT = prompt_of(21)


class Oracle:
    """Drafts the right answer, `depth` tokens at a time, and a wrong one beside it."""

    name = "oracle"

    def __init__(self, answer, depth=6):
        self.answer, self.depth = answer, depth
        self.began, self.observed, self.closed = [], [], 0

    def begin(self, prompt):
        self.began.append(list(prompt))

    def propose(self, context, budget):
        done = len(context.tokens) - context.prompt_length
        right = self.answer[done : done + self.depth]
        wrong = (right[0] + 1) % VOCABULARY if right else 0
        return [[wrong], right]

    def observe(self, step):
        self.observed.append((list(step.emitted), list(step.accepted)))

    def close(self):
        self.closed += 1


class Ahead(HFRunner):
    """Says that its steps run on while tokens are given out."""

    asynchronous = True


@functools.cache
def ahead():
    return Ahead(ADMITTED["llama"].build())


@pytest.fixture(params=["waits", "asynchronous"])
def runner(request):
    if request.param == "waits":
        return runner_of("llama")
    ahead().clear()
    return ahead()


@pytest.fixture(scope="module")
def answer():
    return generate(plain_model("llama"), PROMPT, most=40)


def live(runner):
    return sorted(runner.slots)


def test_tokens_are_given_out_while_the_next_step_runs(runner, answer):
    """Not a text's last ones: another may take its place."""
    steps = []

    def step(trees, want=NEXT_TOKENS):
        steps.append(len(trees))
        return type(runner).step(runner, trees, want)

    def requests():
        yield request(PROMPT, Oracle(answer, depth=1), most=7)
        yield request(PROMPT, most=3)

    runner.step = step
    try:
        seen = [(emission.request, len(steps)) for emission in decode(runner, requests(), slots=1)]
    finally:
        del runner.step
    first, second = ([at for index, at in seen if index == one] for one in (0, 1))
    early = int(runner.asynchronous)
    assert first == [1 + early, 1 + early, 2 + early, 2 + early, 3 + early, 3 + early, 4]
    assert second == [5 + early, 6 + early, 7]


def test_drafters_of_a_step_are_asked_together_where_time_is_short(runner, answer):
    asked = []

    class Together(Oracle):
        @staticmethod
        def propose_together(drafters, contexts, budget):
            asked.append((len(drafters), budget, [context.batch for context in contexts]))
            return [
                drafter.propose(context, budget) for drafter, context in zip(drafters, contexts, strict=True)
            ]

    mosts = (4, 9, 40)
    drafters = [Together(answer), Together(answer), Together(answer)]
    requests = [request(PROMPT, drafter, most=most) for drafter, most in zip(drafters, mosts, strict=True)]
    tokens = [[], [], []]
    for emission in decode(runner, [*requests, request(PROMPT, most=3)], slots=4):
        if emission.request < 3:
            tokens[emission.request].append(emission.token)
    assert tokens == [answer[:most] for most in mosts]
    if not runner.asynchronous:
        assert not asked
        return
    assert asked[0] == (3, MOST_DRAFT_ROWS // 4, [4, 4, 4])
    assert {count for count, *_ in asked} == {3, 2}, "a last one drafts alone"
    # Drafters of several kinds are asked one by one.
    asked.clear()
    requests = [request(PROMPT, Together(answer), most=9), request(PROMPT, Oracle(answer), most=9)]
    found = [emission.token for emission in decode(runner, requests, slots=2) if emission.request == 1]
    assert found == answer[:9]
    assert not asked


def test_an_end_that_only_the_text_shows_is_looked_for_before_the_next_step(runner, answer):
    class Reading(StopChecker):
        def foresee(self, tokens):
            return None

        def push(self, token):
            text = super().push(token)
            if self.count == 9:
                self.finish_reason = "stop"
            return text

    wanted = request(PROMPT, Oracle(answer))
    wanted.stopping = Reading(None)
    emissions = list(decode(runner, [wanted]))
    assert [emission.token for emission in emissions] == answer[:9]
    assert [emission.finish_reason for emission in emissions] == [None] * 8 + ["stop"]
    assert runner.open(0, GREEDY, [*PROMPT, *answer]) <= len(PROMPT) + 9
    runner.release(0)


def test_a_right_draft_is_accepted_whole(runner, answer):
    drafter = Oracle(answer)
    emissions = list(decode(runner, [request(PROMPT, drafter, most=21)]))
    assert [emission.token for emission in emissions] == answer[:21]
    assert [emission.step for emission in emissions] == [i // 7 for i in range(21)]
    assert [emission.drafted for emission in emissions] == [i % 7 > 0 for i in range(21)]
    assert drafter.began == [PROMPT]
    assert drafter.observed == [(answer[:7], [1, 2, 3, 4, 5, 6]), (answer[7:14], [1, 2, 3, 4, 5, 6])]
    assert drafter.closed == 1


@pytest.mark.parametrize("at", range(1, 8))
def test_eos_inside_an_accepted_branch_ends_there(runner, answer, at):
    first = answer.index(answer[at])
    emissions = list(decode(runner, [request(PROMPT, Oracle(answer), eos=[answer[at]])]))
    assert [emission.token for emission in emissions] == answer[: first + 1]
    assert [e.finish_reason for e in emissions] == [None] * first + ["stop"]
    # Nothing after the end was kept for the next prompt.
    assert runner.open(0, GREEDY, [*PROMPT, *answer]) <= len(PROMPT) + first + 1
    runner.release(0)


def test_any_of_several_eos_ids_ends_the_sequence(runner, answer):
    late, early = answer[11], answer[4]
    tokens = run(runner, [request(PROMPT, Oracle(answer), eos=[late, early])])[0]
    assert tokens == answer[: min(answer.index(late), answer.index(early)) + 1]


@pytest.mark.parametrize("most", [1, 2, 6, 7, 8, 13])
def test_max_new_tokens_is_obeyed_in_the_middle_of_a_branch(runner, answer, most):
    emissions = list(decode(runner, [request(PROMPT, Oracle(answer), most=most)]))
    assert [emission.token for emission in emissions] == answer[:most]
    assert emissions[-1].finish_reason == "length"


@pytest.mark.parametrize("left", [1, 2, 5, 12])
@pytest.mark.parametrize("kind", ["plain", "oracle", "lookahead", "ngram", "draft model"])
def test_drafts_are_clipped_where_the_context_ends(left, kind):
    model = ADMITTED["llama"].build(max_position_embeddings=40)
    small = HFRunner(model)
    prompt = prompt_of(40 - left, seed=3)
    expected = run(small, [request(prompt)])[0]
    assert len(expected) == left, "the last position's token is emitted too"
    drafter = {
        "plain": lambda: None,
        "oracle": lambda: Oracle([*expected, 1, 2, 3, 4, 5, 6], depth=9),
        "lookahead": lambda: LookaheadDrafter(4, 5, 4, prompt_pool=True, keep_window=True),
        "ngram": lambda: NgramDrafter(),
        "draft model": lambda: DraftModelDrafter(small, 9, GREEDY),
    }[kind]()
    small.cache.clear()
    emissions = list(decode(small, [request(prompt, drafter)]))
    assert [emission.token for emission in emissions] == expected
    assert emissions[-1].finish_reason == "length"
    assert not small.slots


def test_a_prompt_that_is_cached_already_gives_the_same_tokens(runner, answer):
    for _ in range(3):
        assert run(runner, [request(PROMPT, Oracle(answer), most=12)])[0] == answer[:12]
    assert runner.open(0, GREEDY, PROMPT) == len(PROMPT) - 1
    runner.release(0)


def test_a_batch_gives_each_prompt_what_it_gives_alone(runner):
    plain = plain_model("llama")
    prompts = [prompt_of(length, seed=length) for length in (3, 17, 40, 8)]
    answers = [generate(plain, prompt, 9) for prompt in prompts]
    requests = [
        request(prompt, Oracle(answer, depth=index) if index else None, most=9 - index)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    for index, tokens in enumerate(run(runner, requests, slots=3)):
        assert tokens == answers[index][: 9 - index]


def test_closing_the_generator_releases_slots_and_drafters(runner, answer):
    drafters = [Oracle(answer), Oracle(answer)]
    stream = decode(runner, [request(PROMPT, drafter) for drafter in drafters])
    next(stream)
    assert live(runner) == [0, 1]
    stream.close()
    assert live(runner) == []
    assert [drafter.closed for drafter in drafters] == [1, 1]


def test_two_streams_share_a_runner(answer):
    runner = runner_of("llama")
    one = decode(runner, [request(PROMPT, Oracle(answer), most=30)])
    begun = [next(one) for _ in range(3)]
    other = run(runner, [request(prompt_of(9, seed=5), LookaheadDrafter(3, 3, 3), most=6)])[0]
    assert_plain(plain_model("llama"), prompt_of(9, seed=5), other)
    assert collect([*begun, *one])[0] == answer[:30]
    assert live(runner) == []


@pytest.mark.parametrize(
    ("branches", "message"),
    [([[3, VOCABULARY]], f"'clumsy' proposed token {VOCABULARY}"), ([[-1]], "proposed token -1")],
)
def test_a_drafter_that_proposes_no_token_of_the_vocabulary_is_named(runner, branches, message):
    drafter = Oracle([])
    drafter.name, drafter.propose = "clumsy", lambda context, budget: branches
    with pytest.raises(RequestError, match=message):
        run(runner, [request(PROMPT, drafter)])
    assert live(runner) == []
    assert drafter.closed == 1


def test_tokens_before_a_failing_proposal_are_given_out(runner, answer):
    drafter = Oracle(answer, depth=1)
    right = drafter.propose
    drafter.propose = lambda context, budget: right(context, budget) if len(context.tokens) < 25 else [[-1]]
    given = []
    stream = decode(runner, [request(PROMPT, drafter)])
    with pytest.raises(RequestError, match="proposed token -1"):
        given.extend(emission.token for emission in stream)
    assert given == answer[:4]
    assert live(runner) == []


def test_a_drafter_that_fails_to_begin_leaves_no_slot_open(runner):
    drafter = Oracle([])
    drafter.begin = lambda prompt: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(runner, [request(PROMPT, drafter)])
    assert live(runner) == []
    assert run(runner, [request(PROMPT, most=2)])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * CONTEXT, f"{CONTEXT} tokens and the model's context {CONTEXT}"),
        ([1, VOCABULARY], f"token id {VOCABULARY} is not in"),
        ([-2, 1], "token id -2"),
    ],
    ids=["empty", "long", "unknown", "negative"],
)
def test_impossible_prompts_are_refused_before_any_work_is_done(runner, prompt, message):
    stream = decode(runner, [request(PROMPT, most=1), request(prompt)], slots=2)
    with pytest.raises(RequestError, match=message):
        next(stream)
    assert live(runner) == []


def test_a_prompt_that_leaves_room_for_one_token_gets_one(runner):
    emissions = list(decode(runner, [request(prompt_of(CONTEXT - 1), NgramDrafter())]))
    assert [(e.finish_reason) for e in emissions] == ["length"]


def test_long_prompts_enter_in_chunks_and_do_not_hold_up_the_others(runner, monkeypatch):
    monkeypatch.setattr(decode_module, "PREFILL_CHUNK", 8)
    prompts = [prompt_of(4, seed=1), prompt_of(50, seed=2)]
    emissions = list(decode(runner, [request(prompt, most=9) for prompt in prompts]))
    order = [emission.request for emission in emissions]
    assert order.index(1) >= 6, "the short prompt's tokens must come while the long one still enters"
    for index, tokens in collect(emissions).items():
        assert_plain(plain_model("llama"), prompts[index], tokens)
    assert [e.step for e in emissions if e.request == 1] == list(range(9)), "only steps that emit count"


def test_the_trace_counts_rows_drafted_and_accepted_by_source(runner, answer):
    emissions = list(decode(runner, [request(PROMPT, Oracle(answer), most=14)]))
    assert [e.draft for e in emissions] == [{"oracle": (7, 6)}, *[None] * 6] * 2
    drafter = LookaheadDrafter(4, 3, 4)
    emissions = list(decode(runner, [request(PROMPT, drafter, most=12)]))
    first = emissions[0].draft
    assert set(first) == {"window"}, "the pool is empty at first"
    assert first["window"][1] == 0, "the pure algorithm never accepts window rows"
    accepted = sum(taken for e in emissions if e.draft for _, taken in e.draft.values())
    assert accepted == sum(emission.drafted for emission in emissions)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logprobs_are_the_unwarped_log_softmax(runner, answer, sampling):
    drafter = Branches(answer, seed=2)
    emissions = list(decode(runner, [request(PROMPT, drafter, sampling, most=10, logprobs=True)]))
    tokens = [emission.token for emission in emissions]
    with torch.no_grad():
        logits = plain_model("llama")(torch.tensor([[*PROMPT, *tokens]])).logits[0].log_softmax(-1)
    expected = [float(logits[len(PROMPT) - 1 + at, token]) for at, token in enumerate(tokens)]
    assert [emission.logprob for emission in emissions] == pytest.approx(expected, abs=1e-4)


def test_other_samples_of_a_prompt_differ_and_repeat(runner):
    def sample(index):
        sampling = SamplingOptions(temperature=1.0, seed=4, sample=index)
        return run(runner, [request(PROMPT, Branches([1, 2, 3]), sampling, most=12)])[0]

    assert sample(0) == sample(0)
    assert len({tuple(sample(index)) for index in range(4)}) == 4


def test_governors_learn_whether_a_steps_time_says_anything(answer, monkeypatch):
    monkeypatch.setattr("shoestring.decoding.decode.PREFILL_CHUNK", 30)

    class Compiling(HFRunner):
        steps = 0

        @property
        def settled(self):
            return self.steps > 4

        def step(self, trees, want=NEXT_TOKENS):
            self.steps += 1
            return super().step(trees, want)

    class Told(Governor):
        def __init__(self):
            super().__init__(first=1)
            self.steps = []

        def ends(self, tokens, rows=None, expected=None, told=1, counts=True, later=False):
            self.steps.append((tokens, rows, told, counts))
            super().ends(tokens, rows, expected, told, counts, later)

    governor, runner = Told(), Compiling(ADMITTED["llama"].build())
    drafters = [Oracle(answer), Oracle(answer)]
    for drafter in drafters:
        drafter.governor = governor
    # The second prompt enters behind the first one, which goes on meanwhile.
    requests = [request(PROMPT, drafters[0], most=40), request(PROMPT * 5, drafters[1], most=6)]
    list(decode(runner, requests))
    counted = [counts for *_, counts in governor.steps]
    assert True in counted
    assert not any(counted[:3]), "what was compiled for, and what also read a prompt"
    assert {told for *_, told, counts in governor.steps if counts} >= {1, 2}
    assert all(rows >= told for _, rows, told, _ in governor.steps if rows is not None)
    runner.close()

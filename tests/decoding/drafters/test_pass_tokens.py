"""PaSS against a literal reading of the paper's loop, and the fused form against plain passes at every step."""

import time

import pytest
import torch
from architectures import ADMITTED, VOCABULARY
from comparing import (
    FLAT_COST,
    GREEDY,
    SAMPLED,
    assert_plain,
    generate,
    plain_model,
    prompt_of,
    request,
    run,
    runner_of,
    untrained,
)
from hypothesis import example, given
from hypothesis import strategies as st

from shoestring.decoding.decode import decode
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.pass_tokens import (
    LookAheadRows,
    PassDrafter,
    Shape,
    TwoCallPassDrafter,
    plan_shape,
)
from shoestring.decoding.drafters.protocol import ROOT, Context, Draft
from shoestring.decoding.drafters.rates import AcceptanceRates
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.tune import StepCost
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError

PROMPT = prompt_of(19)
DEAR = StepCost((1, 2, 4, 128), (1.0, 2.0, 4.0, 128.0))


def predicted(tokens, count, candidates, look_ahead):
    """What the look-ahead rows behind `tokens` predict, by plain passes over their embeddings: top-k per row."""
    model = plain_model("llama")
    with torch.no_grad():
        inputs = torch.cat(
            [model.get_input_embeddings()(torch.tensor(tokens)), look_ahead.embeddings[:count]]
        )
        logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0, len(tokens) :]
    return logits.topk(candidates).indices.tolist()


class Checked:
    """Mixed into a drafter: right and wrong drafts are put in for the predictions, which are checked when read."""

    right = 3

    def propose(self, context, budget):
        rows = self._rows if hasattr(self, "_rows") else self._ahead
        if rows.predictions:
            done = len(context.tokens) - context.prompt_length
            following = self.answer[done : done + len(rows)]
            rows.predictions = [
                [token, (token + 1) % VOCABULARY] if place < self.right else [(token + 1) % VOCABULARY]
                for place, token in enumerate(following)
            ] or rows.predictions
        return super().propose(context, budget)

    def observe(self, step):
        rows = self._rows if hasattr(self, "_rows") else self._ahead
        super().observe(step)
        self.read = getattr(self, "read", 0)
        if rows.predictions:
            expected = predicted(
                step.context.tokens[:-1], len(rows.predictions), rows.candidates, self.look_ahead
            )
            assert rows.predictions == expected
            self.read += len(step.accepted) + 1


class CheckedPass(Checked, PassDrafter):
    pass


class CheckedMerged(Checked, MergedDrafter):
    pass


@pytest.fixture(scope="module")
def answer():
    return generate(plain_model("llama"), PROMPT, most=60)


@pytest.mark.parametrize("budget", [1, 4, 9, 30, 200])
@pytest.mark.parametrize("candidates", [1, 3])
def test_every_prediction_is_that_of_a_plain_pass_behind_the_accepted_text(answer, budget, candidates):
    look_ahead = untrained()
    rates = AcceptanceRates({("pass", position, 0): 0.6 for position in (1, 2, 3)})
    drafter = CheckedPass(look_ahead, budget=budget, candidates=candidates, rates=rates)
    drafter.answer, drafter.look_ahead = answer, look_ahead
    emissions = list(decode(runner_of("llama"), [request(PROMPT, drafter, most=40)]))
    assert [emission.token for emission in emissions] == answer[:40]
    assert all(sum(rows for rows, _ in (e.draft or {}).values()) <= budget for e in emissions)
    if budget >= 9:
        assert emissions[-1].step < 25, "right drafts must be accepted"
        assert drafter.read > 20, "the step that verifies must draft too"


def test_the_merged_drafter_reads_the_same_predictions(answer):
    look_ahead = untrained()
    drafter = CheckedMerged(FLAT_COST, budget=30, look_ahead=look_ahead)
    drafter.answer, drafter.look_ahead = answer, look_ahead
    emissions = list(decode(runner_of("llama"), [request(PROMPT, drafter, most=40)]))
    assert [emission.token for emission in emissions] == answer[:40]
    assert drafter.read > 5
    drafted = {}
    for emission in emissions:
        for source, (_, accepted) in (emission.draft or {}).items():
            drafted[source] = drafted.get(source, 0) + accepted
    assert drafted["pass"] > 5
    assert drafted["look-ahead"] == 0


def paper_loop(look_ahead, count):
    """The paper's two calls, greedy, on plain passes: the tokens that each call emits."""
    model = plain_model("llama")
    tokens, calls = list(PROMPT), []
    embed = model.get_input_embeddings()
    while len(tokens) < len(PROMPT) + count:
        with torch.no_grad():
            inputs = torch.cat([embed(torch.tensor(tokens)), look_ahead.embeddings])
            logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0, len(tokens) - 1 :]
            first, *drafts = logits.argmax(-1).tolist()
            tokens.append(first)
            calls.append([first])
            verified = model(torch.tensor([[*tokens, *drafts]]), use_cache=False).logits[0, len(tokens) - 1 :]
        emitted = []
        for draft, token in zip([*drafts, None], verified.argmax(-1).tolist(), strict=True):
            emitted.append(token)
            if draft != token:
                break
        tokens += emitted
        calls.append(emitted)
    return calls


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_two_call_is_the_papers_loop_call_by_call(tokens):
    look_ahead = untrained(tokens)
    expected = paper_loop(look_ahead, 26)
    steps = {}
    for emission in decode(runner_of("llama"), [request(PROMPT, TwoCallPassDrafter(look_ahead), most=24)]):
        steps.setdefault(emission.step, []).append(emission.token)
    assert list(steps.values())[:-1] == expected[: len(steps) - 1]


def test_sampled_drafts_use_the_noise_of_the_position_they_are_for():
    read = []

    class Spy(TwoCallPassDrafter):
        def observe(self, step):
            super().observe(step)
            read.append(self._rows.predictions)

    # A row with token 7's own embedding is token 7's row: what it predicts is what is drawn behind it.
    vector = plain_model("llama").get_input_embeddings().weight.detach()[7]
    sampling = SamplingOptions(temperature=0.9, seed=11)
    for seed in range(4):
        prompt = prompt_of(19, seed)
        run(runner_of("llama"), [request(prompt, Spy(LookAhead(vector[None])), sampling, most=3)])
        assert_plain(plain_model("llama"), [*prompt, 7], read[0][0], sampling)
        read.clear()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("left", [1, 2, 5, 12])
def test_the_contexts_end_clips_look_ahead_rows(left, sampling):
    small = HFRunner(ADMITTED["llama"].build(max_position_embeddings=40))
    prompt = prompt_of(40 - left, seed=3)
    expected = run(small, [request(prompt, sampling=sampling)])[0]
    for drafter in (
        PassDrafter(untrained(6), budget=30),
        TwoCallPassDrafter(untrained(6)),
        MergedDrafter(FLAT_COST, budget=30, look_ahead=untrained(6)),
    ):
        small.cache.clear()
        assert run(small, [request(prompt, drafter, sampling)])[0] == expected


def test_look_ahead_rows_are_never_kept(answer):
    runner = runner_of("llama")
    run(runner, [request(PROMPT, PassDrafter(untrained(), budget=20), most=30)])
    assert runner.open(0, GREEDY, [*PROMPT, *answer]) == len(PROMPT) + 29
    assert all(token >= 0 for token in runner.cache.tokens(0))
    runner.release(0)


def test_a_row_with_a_token_and_an_embedding_is_refused():
    class Clumsy(PassDrafter):
        def propose(self, context, budget):
            draft = Draft.of([[5]])
            draft.embeddings[0] = untrained().embeddings[0]
            return draft

    with pytest.raises(RequestError, match="'pass' proposed token 5"):
        run(runner_of("llama"), [request(PROMPT, Clumsy(untrained(), budget=4))])


rates = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=8)


@example([[1.0, 1.0, 1.0]], 5, DEAR, 1)
@given(rates, st.integers(0, 90), st.sampled_from([None, FLAT_COST, DEAR]), st.integers(1, 4))
def test_a_shape_is_a_tree_within_the_budget(rates, most, cost, batch):
    shape = plan_shape(rates, most, cost, batch)
    assert len(shape.chains) == len(shape.nodes) + 1
    assert len(shape.nodes) + sum(shape.chains) <= most
    assert all(0 <= count <= len(rates) for count in shape.chains)
    assert len(set(shape.nodes)) == len(shape.nodes)
    depths = {ROOT: 0}
    for node, (parent, rank) in enumerate(shape.nodes):
        assert parent < node
        depths[node] = depths[parent] + 1
        assert rank < len(rates[depths[node] - 1])
    if cost is DEAR:
        assert shape == Shape((), (0,)), "a second row costs as much as a second step"


def test_a_shape_puts_look_ahead_rows_where_the_path_ends():
    unsure = plan_shape([[0.2], [0.2]], 6)
    assert unsure.nodes[0] == (ROOT, 0)
    assert unsure.chains[0] == 2
    sure = plan_shape([[0.95], [0.95]], 4)
    assert sure.nodes == ((ROOT, 0), (0, 0))
    assert sure.chains[2] == 2
    assert sure.chains[0] == 0


def test_planning_takes_little_time():
    rates = [[0.4, 0.15, 0.1, 0.05]] * 8
    began = time.process_time()
    for _ in range(5):
        plan_shape(rates, 127, FLAT_COST)
    assert (time.process_time() - began) / 5 < 0.2


def test_without_predictions_only_the_last_tokens_rows_are_added():
    drafter = PassDrafter(untrained(3), budget=50)
    drafter.begin(PROMPT)
    draft = drafter.propose(Context(list(PROMPT), len(PROMPT)), 1024)
    assert draft.parents == [ROOT, 0, 1]
    assert list(draft.embeddings) == [0, 1, 2]
    assert len(PassDrafter(untrained(3), budget=2).propose(Context(list(PROMPT), len(PROMPT)), 1024)) == 2


def test_where_rows_are_dear_pass_decodes_plainly():
    drafter = PassDrafter(untrained(), DEAR)
    drafter.begin(PROMPT)
    assert len(drafter.propose(Context(list(PROMPT), len(PROMPT)), 1024)) == 0
    merged = MergedDrafter(DEAR, look_ahead=untrained())
    merged.begin(PROMPT)
    assert not merged.propose(Context(list(PROMPT), len(PROMPT)), 1024).embeddings


def test_more_look_ahead_embeddings_than_are_counted():
    for native in (None, False):
        drafter = MergedDrafter(None, 100, look_ahead=untrained(50), rates=AcceptanceRates(native=native))
        drafter.begin([5])
        draft = drafter.propose(Context([5], 1), 1024)
        assert len(draft.embeddings) == 30
        assert {owner for owners in draft.owners.values() for owner in owners} == {"look-ahead"}


def test_a_batch_shares_rates_and_gives_each_prompt_its_own_text():
    prompts = [prompt_of(length, seed=length) for length in (5, 18, 30)]
    shared = AcceptanceRates()
    drafters = [PassDrafter(untrained(), budget=12, rates=shared) for _ in prompts]
    requests = [request(prompt, drafter, most=14) for prompt, drafter in zip(prompts, drafters, strict=True)]
    plain = plain_model("llama")
    for prompt, tokens in zip(prompts, run(runner_of("llama"), requests, slots=2), strict=True):
        assert tokens == generate(plain, prompt, 14)
    assert shared.rate(("pass", 1, 0)) < 0.3, "random embeddings must be found out"


def test_neither_cost_nor_budget_is_an_error():
    with pytest.raises(RequestError, match="needs a budget or the measured cost"):
        PassDrafter(untrained())


def test_rows_forget_between_sequences():
    rows = LookAheadRows(untrained(), 2)
    rows.predictions = [[1, 2]]
    rows.forget()
    assert rows.predictions == []

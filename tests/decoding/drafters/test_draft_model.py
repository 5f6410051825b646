import pytest
from architectures import ADMITTED
from comparing import (
    GREEDY,
    SAMPLED,
    assert_same,
    generate,
    plain_model,
    prompt_of,
    request,
    run,
    runner_of,
)

from shoestring.decoding.decode import decode
from shoestring.decoding.drafters.draft_model import DraftModelDrafter
from shoestring.decoding.drafters.protocol import Context
from shoestring.engine.hf_runner import HFRunner
from shoestring.errors import RequestError

PROMPT = prompt_of(21)


@pytest.fixture(scope="module")
def twin():
    """The same weights again, in a runner of its own."""
    return HFRunner(ADMITTED["llama"].build())


@pytest.fixture(scope="module")
def stranger():
    return HFRunner(ADMITTED["llama"].build(seed=5))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_of_the_same_model_every_draft_is_accepted(twin, sampling):
    expected = run(runner_of("llama"), [request(PROMPT, sampling=sampling, most=24)])[0]
    drafter = DraftModelDrafter(twin, 5, sampling)
    emissions = list(decode(runner_of("llama"), [request(PROMPT, drafter, sampling, most=24)]))
    assert [emission.token for emission in emissions] == expected
    assert [emission.step for emission in emissions] == [index // 6 for index in range(24)]
    assert not twin.slots


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_of_another_model_wrong_drafts_are_rolled_back(stranger, sampling):
    expected = run(runner_of("llama"), [request(PROMPT, sampling=sampling, most=16)])[0]
    drafter = DraftModelDrafter(stranger, 4, sampling)
    tokens = run(runner_of("llama"), [request(PROMPT, drafter, sampling, most=16)])[0]
    assert_same(plain_model("llama"), PROMPT, tokens, expected, sampling)


def test_after_any_history_it_drafts_what_its_model_generates(stranger):
    plain = ADMITTED["llama"].build(seed=5)
    drafter = DraftModelDrafter(stranger, 3, GREEDY)
    drafter.begin(PROMPT)
    tokens = list(PROMPT)
    try:
        # Nothing accepted, all accepted, one accepted, other tokens than drafted, several more than drafted.
        for turn in range(5):
            draft = drafter.propose(Context(tokens, len(PROMPT)), 100).tokens
            assert draft == generate(plain, tokens, 3)
            tokens += [[7], [*draft, 8], [draft[0], 9], [3, 4], [5, 6, 7, 8, 9]][turn]
    finally:
        drafter.close()
    assert not stranger.slots


def test_a_batch_and_two_requests_at_once_have_slots_of_their_own(twin):
    prompts = [prompt_of(9, seed=1), prompt_of(14, seed=2)]
    expected = [generate(plain_model("llama"), prompt, 8) for prompt in prompts]
    runner = runner_of("llama")
    first = decode(runner, [request(prompts[0], DraftModelDrafter(twin, 3, GREEDY), most=8)])
    begun = [next(first).token]
    drafters = [DraftModelDrafter(twin, 2, GREEDY) for _ in prompts]
    requests = [request(p, drafter, most=8) for p, drafter in zip(prompts, drafters, strict=True)]
    assert run(runner, requests) == expected
    assert begun + [emission.token for emission in first] == expected[0]
    assert not twin.slots


def test_the_draft_stays_inside_the_draft_models_context():
    small = HFRunner(ADMITTED["llama"].build(max_position_embeddings=24))
    expected = run(runner_of("llama"), [request(PROMPT, most=10)])[0]
    for prompt_first in (PROMPT, prompt_of(30)):
        expected = run(runner_of("llama"), [request(prompt_first, most=10)])[0]
        drafter = DraftModelDrafter(small, 5, GREEDY)
        assert run(runner_of("llama"), [request(prompt_first, drafter, most=10)])[0] == expected


def test_its_slot_is_released_when_the_request_fails(twin):
    class Failing(DraftModelDrafter):
        def observe(self, step):
            raise RequestError("no")

    with pytest.raises(RequestError, match="no"):
        run(runner_of("llama"), [request(PROMPT, Failing(twin, 3, GREEDY))])
    assert not twin.slots
    assert not runner_of("llama").slots

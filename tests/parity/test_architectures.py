"""Every strategy on every architecture gives the tokens of transformers' own `generate`, or the model is refused."""

import pytest
import torch
from architectures import ADMITTED, REFUSED, SLIDING_WINDOW
from comparing import (
    GREEDY,
    SAMPLED,
    Branches,
    assert_plain,
    assert_same,
    generate,
    plain_model,
    prompt_of,
    request,
    run,
    runner_of,
    strategies_of,
)

from shoestring.decoding import decode as decode_module
from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.drafters.ngram import NgramDrafter
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.runner import Outputs
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import UnsupportedModelError

PROMPT = prompt_of(21)
assert len(PROMPT) > 2 * SLIDING_WINDOW


def _existing(table):
    parameters = []
    for name, architecture in table.items():
        reason = f"{architecture.model} does not exist in this version of transformers"
        parameters.append(
            pytest.param(name, marks=pytest.mark.skipif(not architecture.exists, reason=reason))
        )
    return parameters


@pytest.fixture(params=_existing(ADMITTED))
def name(request):
    return request.param


def test_greedy_tokens_are_those_of_generate(name):
    runner, plain = runner_of(name), plain_model(name)
    expected = generate(plain, PROMPT)
    assert len(set(expected)) > 5, "the model's output is degenerate; scale it differently"
    steps = {}
    for strategy, drafter in strategies_of(name).items():
        runner.cache.clear()
        emissions = list(decode_module.decode(runner, [request(PROMPT, drafter(expected))]))
        assert_same(plain, PROMPT, [emission.token for emission in emissions], expected)
        steps[strategy] = emissions[-1].step + 1
    assert steps["autoregressive"] == len(expected)
    assert steps["branches"] < len(expected), "no draft was ever accepted: the test shows nothing"


def test_sampled_tokens_are_those_of_plain_sampling(name):
    runner, plain = runner_of(name), plain_model(name)
    expected = run(runner, [request(PROMPT, sampling=SAMPLED)])[0]
    assert_plain(plain, PROMPT, expected, SAMPLED)
    for drafter in strategies_of(name).values():
        runner.cache.clear()
        tokens = run(runner, [request(PROMPT, drafter(expected), SAMPLED)])[0]
        assert_same(plain, PROMPT, tokens, expected, SAMPLED)


def test_slots_that_join_at_different_times_do_not_disturb_each_other(name, monkeypatch):
    monkeypatch.setattr(decode_module, "PREFILL_CHUNK", 16)  # so that the long prompt joins late
    runner, plain = runner_of(name), plain_model(name)
    lengths = [(9, 6), (33, 9), (19, 14), (5, 8), (26, 7)]
    requests, prompts = [], []
    for index, (length, most) in enumerate(lengths):
        prompts.append(prompt_of(length, seed=index + 1))
        drafter = [LookaheadDrafter(4, 3, 4), None, Branches(prompts[-1][:12], index), NgramDrafter()][
            index % 4
        ]
        requests.append(request(prompts[-1], drafter, SAMPLED if index % 2 else GREEDY, most))
    for index, tokens in enumerate(run(runner, requests, slots=3)):
        assert len(tokens) == lengths[index][1]
        assert_plain(plain, prompts[index], tokens, requests[index].sampling)


def test_a_prompt_in_chunks_gives_the_same_tokens(name, monkeypatch):
    runner, plain = runner_of(name), plain_model(name)
    expected = run(runner, [request(PROMPT, most=6)])[0]
    for chunk in (1, 5, 20):
        runner.cache.clear()
        monkeypatch.setattr(decode_module, "PREFILL_CHUNK", chunk)
        tokens = run(runner, [request(PROMPT, LookaheadDrafter(3, 3, 3), most=6)])[0]
        assert_same(plain, PROMPT, tokens, expected)


def test_a_reused_prefix_gives_the_same_tokens(name):
    runner, plain = runner_of(name), plain_model(name)
    answer = run(runner, [request(PROMPT, Branches([3, 4, 5]), most=8)])[0]
    longer = [*PROMPT, *answer, *prompt_of(6, seed=9)]
    opened = runner.open(0, GREEDY, longer)
    runner.release(0)
    assert opened >= len(PROMPT) + len(answer) - 1, "the released slot's cache was not taken over"
    tokens = run(runner, [request(longer, LookaheadDrafter(4, 3, 4), most=8)])[0]
    assert_plain(plain, longer, tokens)


def test_a_prefix_shared_with_a_live_slot_gives_the_same_tokens(name):
    runner, plain = runner_of(name), plain_model(name)
    runner.open(5, GREEDY, PROMPT)
    runner.step({5: TokenTree.chain(PROMPT)}, Outputs({5: []}))
    runner.commit({5: range(len(PROMPT))})
    try:
        branch = [*PROMPT[:18], *prompt_of(7, seed=4)]
        assert runner.open(6, GREEDY, branch) == 18
        runner.release(6)
        assert_plain(plain, branch, run(runner, [request(branch, Branches([1, 2]), most=6)])[0])
        last = runner.step({5: TokenTree((PROMPT[0], 7, 8), (-1, 0, 0))})[5]
        with torch.no_grad():
            logits = plain(torch.tensor([[*PROMPT, PROMPT[0], 8]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(last.logits(2), logits, atol=1e-4, rtol=1e-4)
    finally:
        runner.release(5)


@pytest.mark.parametrize("refused", _existing(REFUSED))
def test_what_would_be_silently_wrong_is_refused_by_name_and_reason(refused):
    model = REFUSED[refused].build()
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=rf"^{refused} models .*{REFUSED[refused].reason}"):
        HFRunner(model)
    assert model.config._attn_implementation == attention

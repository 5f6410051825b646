"""The native step against the plain runner: equal tokens and near-equal logits, whatever the shape of the steps."""

import functools
import random

import numpy as np
import pytest
import torch
from architectures import ADMITTED, SLIDING_WINDOW
from comparing import (
    GREEDY,
    SAMPLED,
    STRATEGIES,
    Branches,
    assert_plain,
    assert_same,
    generate,
    plain_model,
    prompt_of,
    request,
    run,
    runner_of,
)
from driving import assert_driven_alike, assert_embeddings_and_masks_alike, assert_same_results, random_tree

from shoestring.decoding import decode as decode_module
from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.drafters.ngram import NgramDrafter
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.runner import Outputs
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree

native = pytest.importorskip("shoestring._native", reason="built without the native part")

FAMILY = ["llama", "mistral", "qwen2", "qwen2-sliding", "qwen3", "gemma", "gemma2", "gemma3", "smollm3"]
PROMPT = prompt_of(21)
assert len(PROMPT) > 2 * SLIDING_WINDOW


@functools.cache
def _native_of(name: str, instruction_set: str | None = None) -> NativeRunner:
    return NativeRunner.from_module(plain_model(name), instruction_set=instruction_set)


def native_of(name: str, instruction_set: str | None = None) -> NativeRunner:
    """The architecture's native runner with nothing cached."""
    runner = _native_of(name, instruction_set)
    assert not runner.cache.live, "a test left a slot open"
    runner.cache.clear()
    return runner


@pytest.fixture(params=[name for name in FAMILY if ADMITTED[name].exists])
def name(request):
    return request.param


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_rows_are_those_of_the_plain_runner(name, instruction_set):
    chance = random.Random(3)
    script = []
    for index, rows in enumerate((3, 17, 1, 40, 6, 2, 33, 1)):
        slots = (0, 1) if index % 3 else (0,)
        kind = "chain" if index % 2 == 0 else "tree"
        script.append({slot: random_tree(chance, rows + slot, kind) for slot in slots})
    assert_driven_alike([runner_of(name), native_of(name, instruction_set)], script, layers=(0, 1, 2))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_long_contexts_are_attended_in_several_splits(name):
    changes = {"max_position_embeddings": 2048, "sliding_window": 700}
    model, native_model = (ADMITTED[name].build(**changes) for _ in range(2))
    from shoestring.engine.hf_runner import HFRunner

    chance = random.Random(1)
    script = [{0: random_tree(chance, 600, "chain"), 1: random_tree(chance, 500, "chain")}]
    script += [
        {0: random_tree(chance, rows, "tree"), 1: random_tree(chance, 2, "chain")}
        for rows in (30, 1, 300, 3, 400)
    ]
    runners = [HFRunner(model), NativeRunner.from_module(native_model)]
    assert_driven_alike(runners, script)


def test_greedy_tokens_are_those_of_generate(name):
    runner, plain = native_of(name), plain_model(name)
    expected = generate(plain, PROMPT)
    for drafter in STRATEGIES.values():
        runner.cache.clear()
        assert_same(plain, PROMPT, run(runner, [request(PROMPT, drafter(expected))])[0], expected)


def test_sampled_tokens_are_those_of_the_plain_runner(name):
    plain = plain_model(name)
    expected = run(runner_of(name), [request(PROMPT, sampling=SAMPLED)])[0]
    runner = native_of(name)
    for drafter in STRATEGIES.values():
        runner.cache.clear()
        tokens = run(runner, [request(PROMPT, drafter(expected), SAMPLED)])[0]
        assert_same(plain, PROMPT, tokens, expected, SAMPLED)


def test_slots_that_join_at_different_times_do_not_disturb_each_other(name, monkeypatch):
    monkeypatch.setattr(decode_module, "PREFILL_CHUNK", 16)
    runner, plain = native_of(name), plain_model(name)
    lengths = [(9, 6), (33, 9), (19, 14), (5, 8), (26, 7)]
    requests, prompts = [], []
    for index, (length, most) in enumerate(lengths):
        prompts.append(prompt_of(length, seed=index + 1))
        drafters = [LookaheadDrafter(4, 3, 4), None, Branches(prompts[-1][:12], index), NgramDrafter()]
        requests.append(request(prompts[-1], drafters[index % 4], SAMPLED if index % 2 else GREEDY, most))
    for index, tokens in enumerate(run(runner, requests, slots=3)):
        assert len(tokens) == lengths[index][1]
        assert_plain(plain, prompts[index], tokens, requests[index].sampling)


def test_a_prompt_in_chunks_gives_the_same_tokens(name, monkeypatch):
    runner, plain = native_of(name), plain_model(name)
    expected = run(runner, [request(PROMPT, most=6)])[0]
    for chunk in (1, 5, 20):
        runner.cache.clear()
        monkeypatch.setattr(decode_module, "PREFILL_CHUNK", chunk)
        tokens = run(runner, [request(PROMPT, LookaheadDrafter(3, 3, 3), most=6)])[0]
        assert_same(plain, PROMPT, tokens, expected)


def test_a_reused_prefix_gives_the_same_tokens(name):
    runner, plain = native_of(name), plain_model(name)
    answer = run(runner, [request(PROMPT, Branches([3, 4, 5]), most=8)])[0]
    longer = [*PROMPT, *answer, *prompt_of(6, seed=9)]
    opened = runner.open(0, GREEDY, longer)
    runner.release(0)
    assert opened >= len(PROMPT) + len(answer) - 1, "the released slot's cache was not taken over"
    tokens = run(runner, [request(longer, LookaheadDrafter(4, 3, 4), most=8)])[0]
    assert_plain(plain, longer, tokens)


def test_a_prefix_shared_with_a_live_slot_gives_the_same_tokens(name):
    runner, plain = native_of(name), plain_model(name)
    runner.open(5, GREEDY, PROMPT)
    runner.step({5: TokenTree.chain(PROMPT)}, Outputs({5: []}))
    runner.commit({5: range(len(PROMPT))})
    try:
        branch = [*PROMPT[:18], *prompt_of(7, seed=4)]
        assert runner.open(6, GREEDY, branch) == 18
        runner.release(6)
        assert_plain(plain, branch, run(runner, [request(branch, Branches([1, 2]), most=6)])[0])
        last = runner.step({5: TokenTree((PROMPT[0], 7, 8), (-1, 0, 0))}, Outputs(logits=True))[5]
        with torch.no_grad():
            logits = plain(torch.tensor([[*PROMPT, PROMPT[0], 8]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(last.logits(2), logits, atol=1e-4, rtol=1e-4)
    finally:
        runner.release(5)


def test_rows_may_bring_embeddings_and_masks_of_allowed_tokens(name):
    assert_embeddings_and_masks_alike([runner_of(name), native_of(name)])


def test_rows_out_of_order_can_be_kept():
    plain, runner = runner_of("llama"), native_of("llama")
    for one in (plain, runner):
        one.open(0, GREEDY)
        one.step({0: TokenTree([3, 4, 5, 6], [-1, 0, 0, 0])})
        one.commit({0: [2, 0, 3]})
    tree = TokenTree.chain([9])
    want = Outputs(logits=True, top_k=3)
    expected, actual = (one.step({0: tree}, want) for one in (plain, runner))
    assert_same_results({0: tree}, expected, actual)
    for one in (plain, runner):
        one.release(0)


def test_a_row_in_bfloat16_does_not_depend_on_the_other_rows_of_its_step():
    model = ADMITTED["llama"].build().to(torch.bfloat16)
    runner = NativeRunner.from_module(model)
    sequence = prompt_of(60)
    runner.open(0, GREEDY)
    whole = runner.step({0: TokenTree.chain(sequence)}, Outputs(logits=True))[0]
    all_rows = np.stack([whole.logits(row).numpy().copy() for row in range(60)])
    runner.open(1, GREEDY)
    for position, token in enumerate(sequence):
        # The row beside siblings that it does not see.
        rows = 1 + position % 7
        tree = TokenTree([token] + [13] * (rows - 1), [-1] + [0] * (rows - 1))
        result = runner.step({1: tree}, Outputs({1: [0]}, logits=True))[1]
        np.testing.assert_array_equal(result.logits(0).numpy(), all_rows[position])
        runner.commit({1: [0]})
    runner.release(0)
    runner.release(1)


def test_bfloat16_is_as_near_to_float32_as_transformers_is(name):
    model = ADMITTED[name].build().to(torch.bfloat16)
    exact = ADMITTED[name].build()
    if name == "gemma2":
        model.set_attn_implementation("eager")
        exact.set_attn_implementation("eager")
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference = exact(torch.tensor([PROMPT])).logits[0]
        theirs = model(torch.tensor([PROMPT])).logits[0].float()
    runner = NativeRunner.from_module(model)
    runner.open(0, GREEDY)
    results = runner.step({0: TokenTree.chain(PROMPT)}, Outputs(logits=True))[0]
    ours = torch.stack([results.logits(row) for row in range(len(PROMPT))])
    assert (ours - reference).norm() <= 2 * (theirs - reference).norm()
    runner.release(0)


def test_the_default_model_gives_the_same_64_tokens(smollm2):
    prompt = smollm2.encode("The history of the printing press begins in")
    runner = NativeRunner.from_module(smollm2.model)
    expected = run(smollm2.runner, [request(prompt, most=64)])[0]
    assert run(runner, [request(prompt, most=64)])[0] == expected
    runner.cache.clear()
    assert run(runner, [request(prompt, LookaheadDrafter(7, 4, 7), most=64)])[0] == expected
    sampled = SamplingOptions(temperature=0.8, top_p=0.95, seed=5)
    expected = run(smollm2.runner, [request(prompt, sampling=sampled, most=32)])[0]
    assert run(runner, [request(prompt, NgramDrafter(), sampled, most=32)])[0] == expected

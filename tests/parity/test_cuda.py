"""The fused step of GPUs against the plain runner. Without a GPU its kernels are interpreted, and nothing is captured."""

import functools
import random

import interpreted_triton
import pytest
import torch
from architectures import ADMITTED, VOCABULARY
from comparing import (
    FLAT_COST,
    GREEDY,
    SAMPLED,
    STRATEGIES,
    assert_plain,
    assert_same,
    generate,
    plain_model,
    prompt_of,
    request,
    run,
    runner_of,
    untrained,
)
from driving import assert_driven_alike, assert_embeddings_and_masks_alike, random_tree

from shoestring.decoding.decode import decode
from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.rates import drafting_part
from shoestring.engine.cuda.graphs import BucketStep
from shoestring.engine.cuda.loading import runner_of_module
from shoestring.engine.cuda.runner import CudaRunner
from shoestring.engine.cuda.tuning import LaunchConfig, Problem, Tuning
from shoestring.engine.native_weights import named_weights
from shoestring.engine.runner import Outputs, Runner
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import NativeTree, TokenTree
from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.quantization import pack, unpack, weight_type_for

INTERPRETED = interpreted_triton.DEVICE == "cpu"
FAMILY = (
    ["qwen3", "gemma3"]  # the interpreter is slow
    if INTERPRETED
    else ["llama", "mistral", "qwen2", "qwen2-sliding", "qwen3", "gemma", "gemma2", "gemma3", "smollm3"]
)
PROMPT = prompt_of(21)


@functools.cache
def _fused(name: str) -> CudaRunner:
    return runner_of_module(ADMITTED[name].build().to(interpreted_triton.DEVICE))


def fused(name: str) -> CudaRunner:
    """The architecture's fused runner with nothing cached."""
    runner = _fused(name)
    assert not runner.cache.live, "a test left a slot open"
    runner.clear()
    return runner


@pytest.fixture(params=[name for name in FAMILY if ADMITTED[name].exists])
def name(request):
    return request.param


def test_rows_are_those_of_the_plain_runner(name):
    chance = random.Random(3)
    script = []
    for index, rows in enumerate((3, 9, 1) if INTERPRETED else (3, 11, 1, 40, 6, 64, 300, 2, 33, 1)):
        slots = (0, 1) if index % 3 == 1 else (0,)
        kind = "chain" if index % 2 == 0 else "tree"
        script.append({slot: random_tree(chance, rows + slot, kind) for slot in slots})
    assert_driven_alike([runner_of(name), fused(name)], script, layers=(0, 1, 2))


class _Tails(Tuning):
    """Whole rows for all products of several, in two parts each."""

    def config(self, problem: Problem, processors: int = 132) -> LaunchConfig:
        if problem.rows == 1:
            return super().config(problem, processors)
        front = max(16, 1 << (problem.inputs - 1).bit_length() - 1)
        return LaunchConfig("whole_rows", 16, front, 8, warps=1, tail=front)


def test_launches_can_be_exchanged():
    runner, tree = fused("qwen3"), random_tree(random.Random(4), 9, "tree")
    before = runner.tuning
    seen = []
    try:
        for tuning in (before, _Tails()):
            runner.tuning = tuning
            assert not len(runner.steps), "nothing that was captured with other launches is left"
            runner.open(0, SamplingOptions(), PROMPT)
            runner.step({0: TokenTree.chain(PROMPT)}, Outputs({0: []}))
            runner.commit({0: range(len(PROMPT))})
            results = runner.step({0: tree})[0]
            seen.append(torch.stack([results.logits(row).clone() for row in range(9)]))
            runner.release(0)
            runner.clear()
    finally:
        runner.tuning = before
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert not torch.equal(*seen), "other launches add in another order"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is slow; one strategy is enough there")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_tokens_of_generate(name, strategy):
    runner, plain = fused(name), plain_model(name)
    expected = generate(plain, PROMPT)
    found = run(runner, [request(PROMPT, STRATEGIES[strategy](expected))])[0]
    assert_same(plain, PROMPT, found, expected)


def test_greedy_and_sampled_sequences_share_steps():
    runner, plain = fused("qwen3"), plain_model("qwen3")
    unfiltered = SamplingOptions(temperature=0.8, seed=3)
    most = 3 if INTERPRETED else 24
    options = [GREEDY, SAMPLED, unfiltered]
    prompts = [prompt_of(5 + index, seed=index) for index in range(3)]
    requests = [
        request(prompt, LookaheadDrafter(2, 3, 2) if index else None, sampling, most)
        for index, (prompt, sampling) in enumerate(zip(prompts, options, strict=True))
    ]
    for prompt, sampling, tokens in zip(prompts, options, run(runner, requests), strict=True):
        assert len(tokens) == most
        assert_plain(plain, prompt, tokens, sampling)


@pytest.mark.skipif(drafting_part() is None, reason="the native part is not installed")
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "filtered"])
def test_native_drafts_are_stepped_and_verified_without_lists(sampling, monkeypatch):
    """Look-ahead rows among them; under filters tokens are drawn one by one, and lists are made."""
    trees, step = [], CudaRunner.step
    monkeypatch.setattr(
        CudaRunner, "step", lambda self, *given: trees.extend(given[0].values()) or step(self, *given)
    )
    runner, plain = fused("qwen3"), plain_model("qwen3")
    prompts = [prompt_of(6) * 2, prompt_of(7, seed=1)]
    requests = [
        request(prompt, MergedDrafter(FLAT_COST, budget=7, look_ahead=untrained()), sampling, most=6)
        for prompt in prompts
    ]
    for prompt, tokens in zip(prompts, run(runner, requests), strict=True):
        assert_plain(plain, prompt, tokens, sampling)
    native = [tree for tree in trees if isinstance(tree, NativeTree)]
    assert len(native) >= 6
    assert any(tree.draft.chains for tree in native)
    listed = ["tokens" in vars(tree) or "parents" in vars(tree) for tree in native]
    assert not any(listed) or sampling is not GREEDY


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "filtered"])
def test_a_step_is_read_late_although_another_stream_has_stepped(monkeypatch, sampling):
    monkeypatch.setattr(CudaRunner, "asynchronous", True)
    runner, plain = fused("qwen3"), plain_model("qwen3")
    prompts = [prompt_of(5), prompt_of(7, seed=1)]
    streams = [
        decode(runner, [request(prompt, LookaheadDrafter(2, 3, 2), sampling, most=5)]) for prompt in prompts
    ]
    found = [[], []]
    for turn in (0, 1, 1, 0, 1, 0, 0, 1, 0, 1):
        found[turn].append(next(streams[turn]).token)
    assert [next(stream, None) for stream in streams] == [None, None]
    for prompt, tokens in zip(prompts, found, strict=True):
        assert_plain(plain, prompt, tokens, sampling)


def test_warmed_up_steps_launch_nothing_and_give_the_same_tokens(monkeypatch):
    runner, plain = fused("qwen3"), plain_model("qwen3")
    progress = []
    runner.warm_up(2, lambda *state: progress.append(state))
    assert progress[0][0] == 0
    assert len(progress) == progress[-1][0] + 1 == progress[-1][1] + 1 > 12
    if not runner.steps.graphs:
        return
    captured = runner.steps.capture_seconds
    monkeypatch.setattr(BucketStep, "launch", None)
    # The first piece of the long one has no outputs.
    prompts = [prompt_of(5), prompt_of(300, seed=1)]
    for prompt, tokens in zip(
        prompts, run(runner, [request(prompt, LookaheadDrafter(3, 3, 3)) for prompt in prompts]), strict=True
    ):
        assert_plain(plain, prompt, tokens)
    assert runner.steps.capture_seconds == captured


def test_a_long_prompt_passes_in_pieces_and_is_reused(monkeypatch):
    from shoestring.engine.cuda import runner as module

    monkeypatch.setattr(module, "GRAPH_ROWS", 4)
    runner, plain = fused("qwen3"), plain_model("qwen3")
    prompt = prompt_of(18)
    tree = TokenTree([*prompt, 5, 6, 7], [*range(-1, 17), 17, 17, 19])
    runner.open(0, GREEDY, prompt)
    results = runner.step({0: tree}, Outputs({0: [16, 17, 18, 20]}, logits=True))[0]
    for row, tokens in ((16, prompt[:17]), (17, prompt), (18, [*prompt, 5]), (20, [*prompt, 6, 7])):
        with torch.no_grad():
            expected = plain(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(results.logits(row).cpu(), expected, atol=1e-4, rtol=1e-4)
    runner.commit({0: [*range(18), 19, 20]})
    runner.release(0)
    longer = [*prompt, 6, 7, 9]
    assert runner.open(0, GREEDY, longer) == 20
    logits = runner.step({0: TokenTree.chain([9])}, Outputs(logits=True))[0].logits(0)
    with torch.no_grad():
        expected = plain(torch.tensor([longer]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-4, rtol=1e-4)
    runner.release(0)


def test_pieces_of_several_slots_share_passes(monkeypatch):
    from shoestring.engine.cuda import runner as module

    runner = fused("qwen3")  # whose check at load is no pass of this step
    monkeypatch.setattr(module, "GRAPH_ROWS", 12)
    passes = []
    pass_ = CudaRunner._pass

    def counted(self, trees, *arguments):
        passes.append(sum(map(len, trees.values())))
        return pass_(self, trees, *arguments)

    monkeypatch.setattr(CudaRunner, "_pass", counted)
    chance = random.Random(8)
    sizes = [
        {0: ("chain", 9), 1: ("chain", 7), 2: ("tree", 10)},
        {2: ("chain", 14), 0: ("tree", 3), 1: ("chain", 1)},
    ]
    script = [
        {slot: random_tree(chance, rows, kind) for slot, (kind, rows) in step.items()} for step in sizes
    ]
    assert_driven_alike([runner_of("qwen3"), runner], script, layers=(0, 2))
    # 9 + 3 and 4 of the chains, and 10 rows that branch anywhere; then 12, 2 with 3 and 1.
    assert sum(passes) == 26 + 18
    assert len(passes) <= 3 + 2
    assert max(passes) <= 12


def test_rows_may_bring_embeddings_and_masks_of_allowed_tokens():
    assert_embeddings_and_masks_alike([runner_of("qwen3"), fused("qwen3")])


def test_it_is_a_runner_and_refuses_what_it_cannot_do():
    runner = fused("qwen3")
    assert isinstance(runner, Runner)
    assert (runner.vocab_size, runner.max_positions, runner.weights) == (VOCABULARY, 512, "float32")
    runner.open(0, GREEDY)
    with pytest.raises(RequestError, match="the fused step takes 256"):
        runner.step({0: TokenTree([1] * 300, [-1] + [0] * 299)})
    with pytest.raises(RequestError, match="position 513 of a model with 512"):
        runner.step({0: TokenTree.chain([1] * 513)})
    runner.release(0)
    with pytest.raises(UnsupportedModelError, match="does not know gpt2 models"):
        runner_of_module(ADMITTED["gpt2"].build())


@pytest.mark.skipif(INTERPRETED, reason="graphs are CUDA's")
def test_graphs_replay_what_launches_compute():
    model = ADMITTED["llama"].build().to("cuda")
    runners = [runner_of_module(model, graphs=graphs) for graphs in (False, True)]
    chance = random.Random(5)
    script = [{0: random_tree(chance, 1 + index % 9, "tree")} for index in range(40)]
    outputs = []
    for runner in runners:
        again = random.Random(7)
        runner.open(0, GREEDY)
        rows = []
        for trees in script:
            result = runner.step(trees, Outputs(logits=True))[0]
            rows += [result.logits(row).clone() for row in range(len(trees[0]))]
            runner.commit({0: trees[0].path(again.randrange(len(trees[0])))})
        runner.release(0)
        outputs.append(torch.stack(rows))
    assert runners[1].steps.capture_seconds > 0
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_folders_weights_are_taken_as_they_are(quantize):
    """Packed by the CPU's part and joined on the device: the same numbers as rounded there, so the same logits."""
    pytest.importorskip("shoestring._native", reason="built without the native part")
    module = ADMITTED["qwen3"].build()
    packed = {
        name: pack(weight, weight_type_for(name, tuple(weight.shape), quantize))
        for name, weight in named_weights(module).items()
    }
    dense = runner_of_module(
        ADMITTED["qwen3"].build().to(interpreted_triton.DEVICE), quantize=quantize, graphs=not INTERPRETED
    )
    own = dict(module.named_parameters())
    for name, matrix in packed.items():
        full = next(one for one in (f"model.{name}", name) if one in own)
        own[full].data = unpack(matrix).view_as(own[full])
    runner = runner_of_module(
        module.to(interpreted_triton.DEVICE), packed=packed, graphs=not INTERPRETED, probe=False
    )
    assert runner.weights == quantize
    found = []
    for one in (dense, runner):
        one.open(0, GREEDY)
        step = one.step({0: TokenTree.chain([5])}, Outputs({0: [0]}, logits=True))[0]
        found.append(step.logits(0).clone())
        one.release(0)
        one.close()
    # The embedding is not rounded where weights are rounded at load, so that the first layer's inputs differ a little.
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights_are_near_the_dense_ones(quantize):
    model = ADMITTED["qwen3"].build().to(interpreted_triton.DEVICE)
    runner = runner_of_module(model, quantize=quantize, graphs=not INTERPRETED)
    assert runner.weights == quantize
    dense = fused("qwen3")
    found = []
    for one in (dense, runner):
        one.open(0, GREEDY)
        found.append(
            one.step({0: TokenTree.chain(PROMPT[:3])}, Outputs({0: [2]}, logits=True))[0].logits(2).clone()
        )
        one.release(0)
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 0 < error < (0.05 if quantize == "int8" else 0.5)

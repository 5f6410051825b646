"""The fused step of GPUs against the plain runner. Without a GPU its kernels are interpreted, and nothing is captured."""

import functools
import random

import interpreted_triton
import pytest
from architectures import ADMITTED
from comparing import (
    STRATEGIES,
    assert_same,
    generate,
    plain_model,
    prompt_of,
    request,
    run,
    runner_of,
)
from driving import assert_driven_alike, random_tree

from shoestring.engine.cuda.loading import runner_of_module
from shoestring.engine.cuda.runner import CudaRunner

FAMILY = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3"]
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
    for index, rows in enumerate((3, 11, 1, 19)):
        slots = (0, 1) if index % 2 else (0,)
        script.append(
            {slot: random_tree(chance, rows + slot, "tree" if index % 2 else "chain") for slot in slots}
        )
    assert_driven_alike([runner_of(name), fused(name)], script, layers=(0, 1, 2))


def test_greedy_tokens_are_those_of_generate():
    runner, plain = fused("llama"), plain_model("llama")
    expected = generate(plain, PROMPT, 10)
    for strategy in ("autoregressive", "lookahead", "merged", "branches", "pass"):
        runner.clear()
        found = run(runner, [request(PROMPT, STRATEGIES[strategy](expected), most=10)])[0]
        assert_same(plain, PROMPT, found, expected)

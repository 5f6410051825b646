"""The native runner itself: refusals, shapes, threads, forks, interrupts, buffers kept alive."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from architectures import ADMITTED
from comparing import GREEDY, plain_model, prompt_of, request, run

from shoestring.engine.native_runner import NativeRunner, why_not
from shoestring.engine.native_weights import config_of, tensors_of
from shoestring.engine.runner import Outputs, Runner
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError, UnsupportedModelError

native = pytest.importorskip("shoestring._native", reason="built without the native part")
PROMPT = prompt_of(30)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def make(**options):
    return NativeRunner.from_module(plain_model("llama"), **options)


def logits_of(runner, tokens):
    runner.open(0, GREEDY)
    last = len(tokens) - 1
    logits = (
        runner.step({0: TokenTree.chain(tokens)}, Outputs({0: [last]}, logits=True))[0].logits(last).clone()
    )
    runner.release(0)
    runner.cache.clear()
    return logits


def test_it_is_a_runner():
    runner = make()
    assert isinstance(runner, Runner)
    assert (runner.vocab_size, runner.max_positions, runner.device.type) == (199, 512, "cpu")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {}, "does not know gpt2 models"),
        ("llama", {"hidden_act": "relu"}, "no activation 'relu'"),
        ("llama", {"head_dim": 12}, "multiples of 8 wide, at most 512, not 12"),
        ("llama", {"rope_parameters": DYNAMIC}, "no rotary scaling 'dynamic'"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(name, changes, reason):
    model = ADMITTED[name].build(**changes)
    assert reason in why_not(model.config)
    with pytest.raises(UnsupportedModelError, match=reason):
        NativeRunner.from_module(model)


def test_a_missing_native_part_is_a_clear_reason(monkeypatch):
    import shoestring

    monkeypatch.delattr(shoestring, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "shoestring._native", None)
    assert "native part of Shoestring is not installed" in why_not(plain_model("llama").config)
    with pytest.raises(UnsupportedModelError, match="not installed"):
        make()


def test_a_missing_weight_is_named():
    model = plain_model("llama")
    tensors = tensors_of(model)
    del tensors["layers.1.mlp.up_proj.weight"]
    with pytest.raises(UnsupportedModelError, match="up_proj of layer 1 is missing"):
        NativeRunner(config_of(model, None), tensors)


def test_weights_are_kept_alive():
    model = ADMITTED["llama"].build()
    expected = logits_of(NativeRunner.from_module(model), PROMPT)
    runner = NativeRunner.from_module(model)
    del model
    gc.collect()
    _ = [torch.full((64, 96), 3.0) for _ in range(50)]
    assert torch.equal(logits_of(runner, PROMPT), expected)


def test_only_what_was_asked_for_is_there():
    runner = make()
    runner.open(0, GREEDY)
    results = runner.step({0: TokenTree.chain(PROMPT)}, Outputs({0: [4, 29]}))[0]
    assert [row for row in range(30) if results.has(row)] == [4, 29]
    with pytest.raises(KeyError):
        results.argmax(3)
    with pytest.raises(KeyError, match="not asked for logits"):
        results.logits(4)
    with pytest.raises(KeyError, match="not asked for top_k"):
        results.top_k(4)
    with pytest.raises(RequestError, match="no hidden state 7"):
        runner.step({0: TokenTree.chain([1])}, Outputs(hidden_states=(7,)))
    with pytest.raises(RequestError, match="position 513 of a model with 512"):
        runner.step({0: TokenTree.chain([1] * 513)})
    assert runner.step({0: TokenTree.chain(PROMPT)}, Outputs({0: []}))[0].has(0) is False
    runner.release(0)


def test_logits_outlive_the_next_step():
    runner = make()
    runner.open(0, GREEDY)
    first = runner.step({0: TokenTree.chain(PROMPT)}, Outputs(logits=True))[0].logits(5)
    copy = first.clone()
    runner.step({0: TokenTree.chain(PROMPT[::-1])}, Outputs(logits=True))
    assert torch.equal(first, copy)
    runner.release(0)


def test_logits_that_are_not_numbers_are_an_error():
    runner = make()
    runner.open(0, GREEDY)
    tree = TokenTree([-1], [-1], embeddings={0: torch.full((64,), float("nan"))})
    with pytest.raises(RequestError, match="not finite"):
        runner.step({0: tree})[0].next_token(0)
    runner.release(0)
    runner.cache.clear()
    assert torch.isfinite(logits_of(runner, PROMPT)).all(), "the cache was poisoned"


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_logits(threads):
    runner = make(threads=threads)
    assert runner.threads == threads
    assert torch.equal(logits_of(runner, PROMPT), logits_of(make(), PROMPT))


def test_two_runners_in_two_threads():
    runners = [make(), make(), make(threads=3)]
    expected = run(runners[0], [request(PROMPT, most=30)])[0]
    outcome = {}

    def work(index):
        for _ in range(3):
            runners[index].cache.clear()
            outcome[index] = run(runners[index], [request(PROMPT, most=30)])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert outcome == dict.fromkeys(range(3), expected)


def test_workers_hold_nothing_of_the_interpreters():
    # A worker may be the last to let go of a step; a reference to a Python object would then be dropped without
    # the interpreter's lock, or, at exit, in a thread that the interpreter stops.
    runner = make(threads=16)
    runner.open(0, GREEDY)
    runner.step({0: TokenTree.chain(PROMPT)})
    storage = runner.cache.storage(0)
    before = sys.getrefcount(storage)
    for _ in range(200):
        runner.step({0: TokenTree.chain(PROMPT)})
        assert sys.getrefcount(storage) == before
    runner.release(0)


def test_idle_workers_sleep():
    runner = make(threads=4)
    logits_of(runner, PROMPT)
    time.sleep(0.05)
    began = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - began < 0.05


PROGRAM = """
import os, sys
sys.path.insert(0, {parity!r})
import torch
torch.set_num_threads(1)
from comparing import *
from shoestring.engine.native_runner import NativeRunner
runner = NativeRunner.from_module(plain_model("llama"), threads=3)
expected = run(runner, [request(prompt_of(30), most=12)])[0]
"""


def script(body):
    parity = os.path.join(os.path.dirname(__file__), "..", "parity")
    return [sys.executable, "-c", PROGRAM.format(parity=parity) + body]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs_with_threads_of_its_own():
    done = subprocess.run(
        script("""
child = os.fork()
runner.cache.clear()
assert run(runner, [request(prompt_of(30), most=12)])[0] == expected
if child == 0:
    del runner
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("both")
"""),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "both", done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_an_interrupt_ends_the_work():
    program = script("""
print("ready", flush=True)
while True:
    runner.cache.clear()
    run(runner, [request(prompt_of(30), most=100)])
""")
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert "KeyboardInterrupt" in errors
        assert process.returncode != 0


def test_prefixes_are_copied_in_bfloat16_too():
    runner = NativeRunner.from_module(ADMITTED["qwen3"].build().to(torch.bfloat16))
    expected = logits_of(runner, [*PROMPT, 3])
    runner.open(1, GREEDY, PROMPT)
    runner.step({1: TokenTree.chain(PROMPT)})
    runner.commit({1: range(len(PROMPT))})
    assert runner.open(2, GREEDY, [*PROMPT, 3]) == len(PROMPT)
    tree = TokenTree((3, 9, 9), (-1, 0, 0))
    logits = runner.step({2: tree}, Outputs({2: [0]}, logits=True))[2].logits(0)
    np.testing.assert_array_equal(logits.numpy(), expected.numpy())
    runner.release(1)
    runner.release(2)

"""Texts that a model writes by itself: its own requests, its greedy answers, and what is kept of them."""

import itertools

import numpy as np
import pytest
from comparing import GREEDY, generate, plain_model, runner_of

from shoestring.decoding import own_texts
from shoestring.decoding.own_texts import bundled_texts, keep_texts, remembered_texts, write_texts
from shoestring.engine.hf_runner import HFRunner

OPENING, ENDING = [3, 7], [5, 6]


@pytest.fixture(scope="module")
def runner():
    return runner_of("llama")


@pytest.fixture
def asked(monkeypatch):
    """The requests that are decoded."""
    requests, decode = [], own_texts.decode

    def watched(runner, wanted, slots):
        return decode(runner, (requests.append(one) or one for one in wanted), slots)

    monkeypatch.setattr(own_texts, "decode", watched)
    monkeypatch.setattr(own_texts, "_REQUEST_TOKENS", 4)
    monkeypatch.setattr(own_texts, "_ANSWER_TOKENS", 6)
    return requests


def test_answers_to_its_own_requests_are_what_it_would_say(runner, asked):
    progress = []
    texts = write_texts(
        runner, OPENING, ENDING, seconds=60, tokens=80, progress=lambda *state: progress.append(state)
    )
    assert texts.dtype == np.int32
    assert len(texts) == 80
    assert progress[-1] == (100, 100)
    assert len(progress) > 3
    assert sorted(progress) == progress
    assert not runner.slots
    made_up = [one for one in asked if one.prompt == OPENING]
    assert all(one.sampling.temperature == 1 for one in made_up)
    assert len({one.sampling.sample for one in made_up}) == len(made_up) > 3
    answered = [one.prompt for one in asked if one.prompt != OPENING]
    assert all(len(prompt) == len(OPENING) + 4 + len(ENDING) for prompt in answered)
    assert len({tuple(prompt) for prompt in answered}) > 3
    # The format's last tokens, then the answer; the last ones were cut short.
    expected = {(*ENDING, *generate(plain_model("llama"), prompt, 6)) for prompt in answered}
    assert {tuple(texts[first : first + 8].tolist()) for first in range(0, 48, 8)} <= expected


def test_without_a_chat_format_texts_are_free(runner, asked):
    texts = write_texts(runner, [3], None, seconds=60, tokens=40)
    assert len(texts) == 40
    assert all(one.prompt == [3] and one.sampling.temperature == 1 for one in asked)


def test_an_end_of_text_ends_a_request_and_is_not_asked_again(runner, asked):
    everything = range(runner.vocab_size)
    assert len(write_texts(runner, OPENING, ENDING, eos_ids=[*everything], seconds=0.5, tokens=40)) == 0
    assert {tuple(one.prompt) for one in asked} == {tuple(OPENING)}, "a request without words"


def test_time_ends_it_and_a_slow_model_writes_nothing(runner, asked, monkeypatch):
    def written(most, fast):
        """A reading of the clock takes a second, and many after the first `fast` ones."""
        ticks = itertools.count()
        monkeypatch.setattr(
            own_texts.time, "perf_counter", lambda: max(tick := next(ticks), 40.0 * (tick - fast))
        )
        return len(write_texts(runner, OPENING, ENDING, seconds=600, tokens=most))

    assert written(100_000, fast=1000) == 0, "less than a token a second will not come to 8,000"
    assert 20 < written(200, fast=150) < 150
    assert not runner.slots


def test_compiling_is_no_writing(asked, monkeypatch):
    class Compiling(HFRunner):
        steps = 0

        @property
        def settled(self):
            return self.steps > 12

        def step(self, *arguments):
            self.steps += 1
            return super().step(*arguments)

    runner = Compiling(plain_model("llama"))
    now = [0.0]

    def clock():
        now[0] += 0.001 if runner.settled else 100.0
        return now[0]

    monkeypatch.setattr(own_texts.time, "perf_counter", clock)
    assert len(write_texts(runner, OPENING, ENDING, seconds=60, tokens=200)) == 200


def test_other_streams_slots_are_left_to_them(runner, asked, monkeypatch):
    used = []
    decode = own_texts.decode
    monkeypatch.setattr(
        own_texts, "decode", lambda *arguments: used.append(arguments[2]) or decode(*arguments)
    )
    for slot in range(3):
        runner.open(slot, GREEDY)
    write_texts(runner, OPENING, ENDING, seconds=60, tokens=10)
    assert sorted(runner.slots) == [0, 1, 2]
    for slot in range(3):
        runner.release(slot)
    assert used == [5]


def test_a_short_context_leaves_no_room(runner, monkeypatch):
    monkeypatch.setattr(own_texts, "_REQUEST_TOKENS", 512)
    assert len(write_texts(runner, OPENING, ENDING, seconds=60, tokens=10)) == 0


def test_texts_are_read_back_and_written_anew_where_the_file_is_none(tmp_path):
    path, texts = tmp_path / "deep" / "texts.npy", np.array([4, 5, 6], np.int32)
    assert (remembered_texts(path, 10, lambda: texts) == texts).all()

    def refuse():
        raise AssertionError("they are there")

    assert (remembered_texts(path, 10, refuse) == texts).all()
    other = np.array([1], np.int32)
    assert (remembered_texts(path, 6, lambda: other) == other).all(), "6 is in no vocabulary of 6"
    path.write_bytes(b"\x93NUMPY, or so it says")
    assert (remembered_texts(path, 10, lambda: other) == other).all()
    np.save(path, np.ones((2, 2), np.int32))
    assert (remembered_texts(path, 10, lambda: other) == other).all()
    assert len(remembered_texts(tmp_path / "none.npy", 10, lambda: other[:0])) == 0


def test_bundled_texts_are_the_bundled_models():
    texts = bundled_texts("smollm2-135m")
    assert texts is not None
    assert texts.dtype == np.int32
    assert len(texts) >= 100_000
    assert 0 <= texts.min() <= texts.max() < 49152
    for name in ("llama", "../texts/smollm2-135m", "", "/etc/passwd"):
        assert bundled_texts(name) is None


def test_texts_are_kept_as_they_come_with_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(own_texts.resources, "files", lambda package: tmp_path)
    for name, texts in (("small", [1, 2, 65535]), ("large", [3, 70_000]), ("none", [])):
        keep_texts(tmp_path / "texts" / f"{name}.npz", np.array(texts, np.int32))
        found = bundled_texts(name)
        assert found is not None
        assert found.dtype == np.int32
        assert found.tolist() == texts

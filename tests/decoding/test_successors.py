import numpy as np
import pytest
import torch
from comparing import GREEDY, plain_model, prompt_of, request, run, runner_of

from shoestring.decoding.drafters.guesses import PlainGuesses
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.protocol import Context
from shoestring.decoding.drafters.rates import AcceptanceRates
from shoestring.decoding.successors import WIDTH, measure_successors, remembered_successors


@pytest.fixture(scope="module")
def runner():
    return runner_of("llama")


def test_each_token_has_its_likeliest_successors_behind_the_first(runner):
    table = measure_successors(runner, first=3, seconds=60)
    assert table.shape == (runner.vocab_size, WIDTH)
    assert table.dtype == np.int32
    for token in (0, 1, runner.vocab_size - 1):
        with torch.no_grad():
            logits = plain_model("llama")(torch.tensor([[3, token]])).logits[0, -1]
        assert table[token].tolist() == logits.topk(WIDTH).indices.tolist()
    assert not runner.slots


def test_time_ends_the_measurement_and_a_slow_model_has_none(runner, monkeypatch):
    from shoestring.decoding import successors

    monkeypatch.setattr(successors, "_ROWS", 8)
    ticks = iter(range(1000))
    monkeypatch.setattr(successors.time, "perf_counter", lambda: float(next(ticks)))
    assert len(measure_successors(runner, 3, seconds=1)) == 0
    some = measure_successors(runner, 3, seconds=30)
    assert 0 < len(some) < runner.vocab_size
    assert len(some) % 8 == 0


def test_a_table_is_read_back_and_measured_anew_for_other_weights(runner, tmp_path, monkeypatch):
    from shoestring.decoding import successors

    path = tmp_path / "deep" / "table.npy"
    table = remembered_successors(runner, 3, path)
    changed = table.copy()
    changed[-1] = 0  # too little to look like another model
    np.save(path, changed)
    assert (remembered_successors(runner, 3, path) == changed).all()
    np.save(path, (table + 1) % runner.vocab_size)
    assert (remembered_successors(runner, 3, path) == table).all()
    path.write_bytes(b"\x93NUMPY, or so it says")
    assert (remembered_successors(runner, 3, path) == table).all()
    np.save(path, table[:0])
    monkeypatch.setattr(successors, "measure_successors", None)
    assert len(remembered_successors(runner, 3, path)) == 0, "too slow then is too slow now"


@pytest.mark.parametrize("native", [False, True])
def test_known_successors_are_drafted_where_nothing_else_is_known(native):
    rates = AcceptanceRates(native=None if native else False)
    if native and rates.native is None:
        pytest.skip("the native part is not installed")
    known = np.array([[1, 2], [2, 3], [4, 0]], np.int32)
    drafter = MergedDrafter(None, 3, rates=rates, known=known)
    assert isinstance(drafter._guesses, PlainGuesses) is not native
    drafter.begin([2])
    draft = drafter.propose(Context([2], 1), 99)
    assert draft.tokens[0] == 4
    assert set(zip(draft.tokens, draft.parents, strict=True)) <= {(4, -1), (0, -1), (1, 1), (2, 1)}
    drafter.begin([9])
    assert len(drafter.propose(Context([9], 1), 99)) == 0, "a token beyond the table"


def test_tokens_stay_those_of_plain_decoding(runner):
    prompt, known = prompt_of(12), measure_successors(runner, 3, seconds=60)
    drafter = MergedDrafter(None, 24, known=known)
    plain = run(runner, [request(prompt, None, most=24, sampling=GREEDY)])
    assert run(runner, [request(prompt, drafter, most=24, sampling=GREEDY)]) == plain

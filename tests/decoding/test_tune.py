import itertools
import json

import pytest
from comparing import runner_of
from hypothesis import given
from hypothesis import strategies as st

from shoestring.decoding.tune import ROW_COUNTS, TAUGHT, StepCost, measure_step_cost, remembered_step_cost


@st.composite
def costs(draw):
    rows = sorted(draw(st.sets(st.integers(2, 200), min_size=1, max_size=8)) | {1})
    seconds = draw(st.lists(st.floats(1e-4, 10), min_size=len(rows), max_size=len(rows)))
    return StepCost(tuple(rows), tuple(seconds), draw(st.booleans()))


@given(costs(), st.integers(1, 400), st.integers(0, 100))
def test_more_rows_never_cost_less(cost, rows, more):
    assert 0 < cost.of(rows) <= cost.of(rows + more) * (1 + 1e-12)


@given(costs())
def test_a_measured_cost_is_given_back_or_a_cheaper_one_of_more_rows(cost):
    for index, rows in enumerate(cost.rows):
        assert cost.of(rows) == pytest.approx(min(cost.seconds[index:]))
    assert cost.most_rows == cost.rows[-1]


def test_costs_between_are_interpolated_and_beyond_in_proportion():
    cost = StepCost((1, 3, 11), (1.0, 2.0, 6.0))
    assert [cost.of(rows) for rows in (1, 2, 3, 7, 11, 22)] == [1, 1.5, 2, 4, 6, 12]
    assert StepCost((4, 8), (1.0, 2.0)).of(1) == 1
    assert StepCost((1,), (0.5,)).of(4) == 2


def test_rows_that_are_rounded_up_cost_what_the_greater_number_does():
    cost = StepCost((1, 8, 16), (1.0, 1.2, 2.0), stairs=True)
    assert [cost.of(rows) for rows in (1, 2, 8, 9, 16, 32)] == [1, 1.2, 1.2, 2, 2, 4]
    # Of a step that is paid for, all rows are used; a ninth would have to pay for eight.
    assert cost.best_rows([0.5, *[0.05] * 30]) == 7


@given(
    costs(), st.lists(st.floats(0, 1), max_size=30).map(lambda c: sorted(c, reverse=True)), st.integers(1, 4)
)
def test_best_rows_is_the_best_of_all_counts(cost, chances, batch):
    def speed(rows):
        return (1 + sum(chances[:rows]) + TAUGHT * rows) / cost.of(batch * (rows + 1))

    best = cost.best_rows(chances, batch)
    assert speed(best) >= max(speed(rows) for rows in range(len(chances) + 1)) * (1 - 1e-9)


@given(costs(), st.lists(st.tuples(st.integers(0, 150), st.integers(1, 5)), min_size=1, max_size=4))
def test_a_table_says_what_each_row_count_costs_however_often_it_is_asked(cost, asked):
    for rows, batch in asked:
        table = cost.table(rows, batch)
        assert table == pytest.approx([cost.of(batch * (count + 1)) for count in range(rows + 1)])
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.0


def test_rows_pay_where_they_are_cheap_only():
    assert StepCost((1, 16), (1.0, 1.1)).pays()
    assert not StepCost((1, 2, 4, 16), (1.0, 2.0, 4.0, 16.0)).pays()
    assert not StepCost((1,), (1.0,)).pays()


def test_measuring_leaves_the_runner_as_it_was():
    runner = runner_of("llama")
    progress = []
    cost = measure_step_cost(runner, repetitions=1, progress=lambda *state: progress.append(state))
    assert cost.rows == ROW_COUNTS
    assert all(seconds > 0 for seconds in cost.seconds)
    assert progress[0] == (0, len(ROW_COUNTS))
    assert progress[-1] == (len(ROW_COUNTS), len(ROW_COUNTS))
    assert not runner.slots


def test_what_else_the_machine_does_is_not_remembered(monkeypatch):
    """Two of three steps are kept waiting by something else."""
    runner, now, steps = runner_of("llama"), [0.0], itertools.count()

    def step(trees, want=None):
        results = original(trees, want) if want is not None else original(trees)
        rows = sum(map(len, trees.values()))
        now[0] += (0.010 + 0.001 * rows) * (1 if next(steps) % 3 == 0 else 7)
        return results

    original = runner.step
    monkeypatch.setattr(runner, "step", step)
    monkeypatch.setattr("shoestring.decoding.tune.time.perf_counter", lambda: now[0])
    cost = measure_step_cost(runner, rows=(1, 8, 16), repetitions=6)
    assert cost.seconds == pytest.approx((0.011, 0.018, 0.026))


def test_a_runner_that_rounds_rows_up_is_measured_where_it_rounds_to(tmp_path, monkeypatch):
    runner, path = runner_of("llama"), tmp_path / "cost.json"
    plain = remembered_step_cost(runner, path)
    assert not plain.stairs
    monkeypatch.setattr(type(runner), "row_sizes", (1, 8, 16, 256))
    cost = measure_step_cost(runner, repetitions=1)
    assert (cost.rows, cost.stairs) == ((1, 8, 16), True)
    remembered = remembered_step_cost(runner, path)
    assert remembered.rows == (1, 8, 16), "what was measured otherwise is not taken"
    assert remembered_step_cost(runner, path) == remembered


def test_a_measured_cost_is_remembered(tmp_path):
    path = tmp_path / "deep" / "cost.json"
    cost = remembered_step_cost(runner_of("llama"), path)
    assert list(path.parent.iterdir()) == [path]
    stored = {"rows": [1, 2], "seconds": [0.25, 0.5], "stairs": False}
    path.write_text(json.dumps(stored))
    assert remembered_step_cost(runner_of("llama"), path) == StepCost((1, 2), (0.25, 0.5)) != cost
    anew = remembered_step_cost(runner_of("llama"), path, anew=True)
    assert anew.rows == ROW_COUNTS
    assert remembered_step_cost(runner_of("llama"), path) == anew


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"rows": [1]}',
        '{"rows": [], "seconds": []}',
        '{"rows": [1, 2], "seconds": [1]}',
        '{"rows": [2, 1], "seconds": [1, 1]}',
        '{"rows": [1, 1], "seconds": [1, 1]}',
        '{"rows": [1, 2], "seconds": [1, 0]}',
        '{"rows": [1, 2], "seconds": [1, NaN]}',
        '{"rows": [1, 2], "seconds": [1, Infinity]}',
        '{"rows": ["x"], "seconds": [1]}',
    ],
)
def test_a_broken_file_is_measured_again(tmp_path, content):
    path = tmp_path / "cost.json"
    path.write_text(content)
    cost = remembered_step_cost(runner_of("llama"), path)
    assert cost.rows == ROW_COUNTS
    assert json.loads(path.read_text())["rows"] == list(ROW_COUNTS)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert remembered_step_cost(runner_of("llama"), tmp_path / "file" / "cost.json").rows == ROW_COUNTS

"""The arithmetic of the speed benchmark: ratios within a round, the better of transformers' ways, texts' lengths."""

from benchmarks.speed import SETS, length_of, summary


def round_of(**speeds):
    """A round in which a contender gave so many tokens a second, over one second a set."""
    return {
        name.replace("_", " "): {
            only: {"tokens": speed, "steps": speed / 2 if name == "auto" else speed, "seconds": 1}
            for only in SETS
        }
        for name, speed in speeds.items()
    }


def test_ratios_are_taken_within_rounds():
    rounds = [
        round_of(transformers_dynamic=10, transformers_static=20, autoregressive=40, auto=80),
        round_of(transformers_dynamic=30, transformers_static=20, autoregressive=60, auto=60),
    ]
    row = summary(rounds, "auto")
    assert row["tokens_per_step"] == 2
    assert row["tokens_per_second"] == 70
    assert row["over_autoregressive"] == {"median": 1.5, "range": [1.0, 2.0]}
    assert row["over_best_transformers"] == {"median": 3.0, "range": [2.0, 4.0]}
    assert row["over_eager_transformers"] == {"median": 5.0, "range": [2.0, 8.0]}
    assert "over_gpt_fast" not in row
    alone = [round_of(autoregressive=40, auto=80), round_of(autoregressive=60, auto=60)]
    assert summary(alone, "auto") == {
        name: value for name, value in row.items() if "transformers" not in name
    }
    rounds[0]["auto"]["gsm8k"]["tokens"] = 160
    assert summary(rounds[:1], "auto", ("gsm8k",))["over_autoregressive"]["median"] == 4
    assert summary(rounds[:1], "auto", ("humaneval",))["over_autoregressive"]["median"] == 2


def test_a_padded_text_counts_up_to_its_end():
    assert length_of([5, 6, 2, 2, 2], [2, 9]) == 3
    assert length_of([5, 6], [2]) == 2

"""Arms of an UltraFastBERT comparison as one result file: `python -m benchmarks.ultrafastbert_quality RUN RUN ...`.

The runs are made by `shoestring train recipes/ultrafastbert-small.yaml model.feedforward=...`, also with `balance=...`,
their classifiers by `recipes/boolq.yaml model=RUN`. Each arm is compared with the first over the same hidden tokens (paired
bootstrap of rows).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import finished_run
from benchmarks.training_tables import arm_name
from shoestring.evaluation.accuracy import wilson_interval
from shoestring.evaluation.results import write_result
from shoestring.fastff.bert_training import LOSSES_FILE


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "runs", type=Path, nargs="+", help="masked language models; the first is the baseline"
    )
    arguments.add_argument(
        "--classifiers", type=Path, nargs="*", default=[], help="runs fine-tuned from those"
    )
    arguments.add_argument(
        "--device", default="auto", help="the device the runs were made on, for the record"
    )
    arguments.add_argument("--at-once", type=int, default=1, help="how many of the runs shared the device")
    arguments.add_argument("--output", type=Path)
    asked = arguments.parse_args()
    classifiers = [finished_run(path) for path in asked.classifiers]
    arms = [arm(path, classifiers) for path in asked.runs]
    check_alike(asked.runs, arms)
    differences = [difference(asked.runs[0], other) for other in asked.runs[1:]]
    result = {
        "benchmark": "ultrafastbert-quality",
        "at_once": asked.at_once,
        "arms": arms,
        "paired": differences,
    }
    for row in arms:
        boolq = row.get("boolq")
        told = (
            f", BoolQ {boolq['mean']:.3f} (always one answer: {boolq['majority_rate']:.3f})" if boolq else ""
        )
        print(
            f"{arm_name(row):12} {row['active_neurons']:5} of {row['neurons']:5} neurons, {row['parameters']:,} "
            f"parameters, perplexity {row['held_out']['perplexity']:.2f}, accuracy {row['held_out']['accuracy']:.3f}, "
            f"{row['training_seconds']:.0f} s{told}"
        )
    if asked.output:
        write_result(asked.output, result, asked.device)
    print(json.dumps(result))


def arm(path: Path, classifiers: list[dict[str, Any]]) -> dict[str, Any]:
    row = finished_run(path)
    own = [c for c in classifiers if Path(c["model"]).resolve() == path.resolve()]
    if own:
        tests = [seed["test"] for seed in own[0]["seeds"]]
        right, examples = sum(test["right"] for test in tests), sum(test["examples"] for test in tests)
        row["boolq"] = {
            "mean": own[0]["test_accuracy"],
            "spread": own[0]["test_accuracy_spread"],
            # Of one seed's test part: the seeds share their examples, which therefore count once.
            "interval": wilson_interval(round(right / len(tests)), examples // len(tests)),
            "examples": examples // len(tests),
            "majority_rate": own[0]["majority_rate"],
            "seeds": [test["accuracy"] for test in tests],
            "recipe": own[0]["recipe"],
        }
    return row


def check_alike(paths: list[Path], arms: list[dict[str, Any]]) -> None:
    """Arms differ in nothing but the feedforward, and how evenly its load is kept."""

    def rest(row: dict[str, Any]) -> dict[str, Any]:
        recipe = json.loads(json.dumps(row["recipe"]))
        recipe["model"].pop("feedforward")
        recipe.pop("balance", None)  # runs from before it have none
        return {"recipe": recipe, "data": row["data"]}

    for path, row in zip(paths, arms, strict=True):
        if rest(row) != rest(arms[0]):
            raise SystemExit(
                f"{path} was trained on another recipe or text than {paths[0]}: not arms of one comparison"
            )


def difference(first: Path, other: Path, samples: int = 1000) -> dict[str, Any]:
    """How many nats a hidden token the other loses more, and the ratio of perplexities, with 95% intervals."""
    a, b = (np.load(path / LOSSES_FILE) for path in (first, other))
    draw = np.random.default_rng(12345)
    found = []
    for _ in range(samples):
        pick = draw.integers(len(a), size=len(a))
        found.append((b[pick, 0].sum() - a[pick, 0].sum()) / a[pick, 1].sum())
    low, high = (float(value) for value in np.percentile(found, [2.5, 97.5]))
    mean = float((b[:, 0].sum() - a[:, 0].sum()) / a[:, 1].sum())
    return {
        "runs": [first.name, other.name],
        "loss_difference": mean,
        "interval": (low, high),
        "perplexity_ratio": math.exp(mean),
    }


if __name__ == "__main__":
    main()

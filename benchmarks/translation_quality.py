"""Scores of finished runs of the Transformer as one result file: `python -m benchmarks.translation_quality runs/A runs/B`.

Translation runs and parsing runs go into files of their own (`benchmark` is `parsing-quality` for the latter).

The runs are made by `shoestring train recipes/NAME.yaml`. Beside each stands what is published for its set. With two runs
or more, each is compared with the first by paired bootstrap over the averaged weights' beam output.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import finished_run
from shoestring.evaluation.results import write_result
from shoestring.evaluation.translation import paired_bootstrap
from shoestring.transformer.corpus import read_corpus, read_lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("runs", type=Path, nargs="+")
    arguments.add_argument(
        "--device", default="auto", help="the device the runs were made on, for the record"
    )
    arguments.add_argument("--at-once", type=int, default=1, help="how many of the runs shared the device")
    arguments.add_argument("--output", type=Path)
    asked = arguments.parse_args()
    rows = [finished_run(path) for path in asked.runs]
    parsing = {row["recipe"]["metric"] == "brackets" for row in rows}
    if len(parsing) > 1:
        raise SystemExit("translation runs and parsing runs have different scores: give one kind at a time")
    differences = [] if True in parsing else [difference(asked.runs[0], other) for other in asked.runs[1:]]
    result = {
        "benchmark": "parsing-quality" if True in parsing else "translation-quality",
        "at_once": asked.at_once,
        "runs": rows,
        "paired": [d for d in differences if d],
    }
    for row in rows:
        for title, ways in row["scores"].items():
            for way, found in ways.items():
                shown = ("f1", "exact") if "f1" in found else ("bleu", "bleu_lowercased", "chrf")
                scores = ", ".join(f"{name} {found[name]:.2f}" for name in shown)
                print(f"{row['run']:20} {title:12} {way:17} {scores}")
    if asked.output:
        write_result(asked.output, result, asked.device)
    print(json.dumps(result))


def difference(first: Path, other: Path) -> dict[str, Any] | None:
    tests = [yaml.safe_load((path / "config.yaml").read_text())["data"] for path in (first, other)]
    common = [title for title, name in tests[0]["test"].items() if tests[1]["test"].get(title) == name]
    if not common:
        return None
    title = common[0]
    references = [target for _, target in read_corpus(tests[0]["test"][title], tests[0]["languages"])]
    systems = [read_lines(path / f"{title}.averaged.beam.txt") for path in (first, other)]
    found = paired_bootstrap(*systems, references)
    return {"test": title, "runs": [first.name, other.name], **vars(found)}


if __name__ == "__main__":
    main()

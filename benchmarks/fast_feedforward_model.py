"""End to end: a whole UltraFastBERT classifier on the CPU against the same with dense feedforwards.

The paper's shape (16 layers of 768, 12 heads), random weights and tokens: for timing only. Contenders differ in their
feedforwards alone, are interleaved, and take other tokens each time; ratios are taken within a round, medians over rounds.
What a whole model gains is bounded by its attention, which is the same in all: `dense-12` is nearly nothing but that.

    python -m benchmarks.fast_feedforward_model \
        --output benchmarks/results/fast_feedforward_model.cpu-2threads-avx512_bf16.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from shoestring.evaluation.results import write_result
from shoestring.fastff.bert import UltraFastBertForSequenceClassification
from shoestring.fastff.bert_recipe import ModelSettings

TREES = "fff-1x11"
FEEDFORWARDS = (TREES, "dense-4095", "dense-3072", "dense-12")
VOCABULARY = 32768


def model_of(feedforward: str, layers: int, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = ModelSettings(feedforward=feedforward, layers=layers).config(VOCABULARY)
    return UltraFastBertForSequenceClassification(config).to(dtype).eval()


def measure(dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of tokens of a text."""
    models = {name: model_of(name, options.layers, getattr(torch, dtype)) for name in FEEDFORWARDS}
    table = []
    for tokens in options.tokens:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(options.rounds + 1):
            for name, model in models.items():
                samples = []
                for _ in range(options.calls):
                    ids = torch.randint(1, VOCABULARY, (1, tokens))
                    began = time.perf_counter()
                    model(ids)
                    samples.append(time.perf_counter() - began)
                if turn:  # the first is a warm-up
                    seconds[name].append(statistics.median(samples))
        row: dict[str, Any] = {"dtype": dtype, "tokens": tokens, "ms": {}, "trees over": {}}
        for name, values in seconds.items():
            row["ms"][name] = round(1e3 * statistics.median(values), 2)
            ratios = [other / own for other, own in zip(values, seconds[TREES], strict=True)]
            row["trees over"][name] = {
                "median": round(statistics.median(ratios), 2),
                "range": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        table.append(row)
        print(row, flush=True)
    return table


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 128, 512], help="of the one text")
    arguments.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--calls", type=int, default=3, help="of a contender in a round")
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        table = [row for dtype in options.dtypes for row in measure(dtype, options)]
    result = {
        "benchmark": "fast_feedforward_model", "layers": options.layers, "threads": options.threads, "table": table,
    }  # fmt: skip
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, "cpu")


if __name__ == "__main__":
    main()

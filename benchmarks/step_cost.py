"""The cost of a step by its number of rows: native and through transformers, interleaved, beside the bandwidth floor.

Each round times one step of every size with both runners behind the same context; medians over rounds count. The
floor is the time to read all weights once at the memory's measured rate: no step of any size can be faster.

    python -m benchmarks.step_cost --output benchmarks/results/step_cost.cpu-2threads-avx512_bf16.json
"""

import json
import statistics
import time
from typing import Any

from benchmarks.common import parser
from shoestring.evaluation.prompts import load_prompts
from shoestring.evaluation.results import write_result

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--context", type=int, default=512)
    arguments.add_argument("--threads", type=int, help="CPU threads (all cores by default)")
    options = arguments.parse_args()

    import torch

    import shoestring
    from shoestring import _native
    from shoestring.engine.hf_runner import HFRunner
    from shoestring.engine.native_runner import NativeRunner

    threads = options.threads or _native.available_processors()
    torch.set_num_threads(threads)
    model = shoestring.load(options.model, device="cpu", dtype=options.dtype)
    native = NativeRunner.from_module(model.model, threads=threads)
    runners = {"native": native, "transformers": HFRunner(model.model)}
    text = "\n\n".join(load_prompts("mt_bench", 40))
    tokens = model.encode(text)
    context, draft = tokens[: options.context], tokens[options.context : options.context + max(ROWS)]
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    bandwidth = []
    for _ in range(options.rounds):
        bandwidth.append(_native.read_bandwidth(256 << 20, threads))
        for name, runner in runners.items():
            for size, seconds in measure(runner, context, draft).items():
                samples[name].setdefault(size, []).append(seconds)
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    floor = weights / max(bandwidth)
    medians = {
        name: {size: statistics.median(times) for size, times in sizes.items()}
        for name, sizes in samples.items()
    }
    print(
        f"{'rows':>8} {'native':>9} {'x t(1)':>7} {'transformers':>13} {'ratio':>6}   (ms; floor {1e3 * floor:.2f})"
    )
    for size, ours in medians["native"].items():
        theirs = medians["transformers"][size]
        print(
            f"{size:>8} {1e3 * ours:9.2f} {ours / medians['native']['1']:7.2f} {1e3 * theirs:13.2f} {theirs / ours:6.2f}"
        )
    result = {
        "benchmark": "step_cost",
        "model": options.model,
        "dtype": options.dtype,
        "threads": threads,
        "instruction_set": native.instruction_set,
        "context": options.context,
        "rounds": options.rounds,
        "weight_bytes": weights,
        "read_gb_per_second": round(max(bandwidth) / 1e9, 1),
        "floor_ms": round(1e3 * floor, 2),
        "median_ms": milliseconds(medians),
        "fastest_ms": milliseconds(
            {n: {size: min(t) for size, t in sizes.items()} for n, sizes in samples.items()}
        ),
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, "cpu")


def measure(runner: Any, context: list[int], draft: list[int]) -> dict[str, float]:
    """Seconds of a prefill of the whole context and of a step of each size behind it; every row's arg-max is taken."""
    from shoestring.engine.runner import Outputs
    from shoestring.engine.sampling import SamplingOptions
    from shoestring.engine.tokentree import TokenTree

    seconds = {}
    runner.cache.clear()
    runner.open(0, SamplingOptions())
    last = len(context) - 1
    began = time.perf_counter()
    runner.step({0: TokenTree.chain(context)}, Outputs({0: [last]}))[0].argmax(last)
    seconds["prefill"] = time.perf_counter() - began
    runner.commit({0: range(len(context))})
    for rows in ROWS:
        # A binary tree: the shape between a chain and a fan.
        tree = TokenTree(draft[:rows], [-1, *((row - 1) // 2 for row in range(1, rows))])
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            runner.step({0: tree})[0].argmax(0)
            best = min(best, time.perf_counter() - began)
        seconds[str(rows)] = best
    runner.release(0)
    return seconds


def milliseconds(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {size: round(1e3 * value, 2) for size, value in sizes.items()} for name, sizes in table.items()
    }


if __name__ == "__main__":
    main()

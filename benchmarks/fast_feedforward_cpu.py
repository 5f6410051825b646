"""Fast feedforward on the CPU against PyTorch's best dense layers, and the sparse training step against the masked one.

A stack of layers that no cache holds, varied inputs, every token through all layers (each adds to its input, in all
contenders). Per token and layer: our kernel (one call for the stack), our modules called one by one, PyTorch's dense
feedforward of as many neurons (4,095) and of BERT's 3,072, in float32 and bfloat16, on one thread and on all: the faster
of the two counts. Contenders are interleaved; medians and ranges are over rounds, ratios are taken within a round.
This is a layer's speed, not a model's: attention remains. On a busy machine PyTorch's threads starve each other unless
OMP_WAIT_POLICY=passive is set.

    python -m benchmarks.fast_feedforward_cpu --output benchmarks/results/fast_feedforward_cpu.cpu-2threads-avx512.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.evaluation.results import write_result
from shoestring.fastff import FastFeedForward, FastFeedForwardStack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Contender = Callable[[Tensor], Tensor]


class Dense(nn.Module):
    """The usual feedforward."""

    def __init__(self, width: int, neurons: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(width, neurons, dtype=dtype)
        self.down = nn.Linear(neurons, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def one_by_one(layers: list[nn.Module]) -> Contender:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(x)
        return x

    return run


def on_threads(threads: int, contender: Contender) -> Contender:
    """On so many of PyTorch's threads."""

    def run(x: Tensor) -> Tensor:
        torch.set_num_threads(threads)
        return contender(x)

    return run


def timed(contender: Contender, x: Tensor) -> float:
    began = time.perf_counter()
    contender(x)
    return time.perf_counter() - began


def measure(
    contenders: dict[str, Contender], inputs: Callable[[], Tensor], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Seconds of one call, a median for each round; a round measures all contenders, each on inputs of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        timed(contender, inputs())
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(statistics.median(timed(contender, inputs()) for _ in range(calls)))
    return seconds


def summary(seconds: list[float], scale: float) -> dict[str, Any]:
    return {
        "us": round(1e6 * statistics.median(seconds) / scale, 3),
        "range": [round(1e6 * min(seconds) / scale, 3), round(1e6 * max(seconds) / scale, 3)],
    }


def leaves_visited(layers: list[FastFeedForward], x: Tensor) -> list[int]:
    """Distinct leaves that the tokens reach in each layer: inputs that all take one way would be a trick."""
    found = []
    for layer in layers:
        found.append(int(layer.paths(x)[:, 0, -1].unique().numel()))
        x = x + layer(x)
    return found


def inference(options: argparse.Namespace, dtype_name: str) -> tuple[list[dict[str, Any]], list[int]]:
    dtype, width = DTYPES[dtype_name], options.width
    fast = [
        FastFeedForward(width, options.depth, dtype=dtype, method="native") for _ in range(options.layers)
    ]
    stack = FastFeedForwardStack(fast, residual=True)
    huge = stack.use_huge_pages()
    threads = sorted({1, options.threads})
    contenders: dict[str, Contender] = {
        "kernel": stack,
        "module": on_threads(options.threads, one_by_one(list(fast))),
    }
    for neurons in options.neurons:
        dense = one_by_one([Dense(width, neurons, dtype) for _ in range(options.layers)])
        for count in threads:
            contenders[f"dense {neurons} on {count}"] = on_threads(count, dense)
    pool = torch.randn(2 * max(options.batch), width).to(dtype)
    visited = leaves_visited(fast, pool[: max(options.batch)])
    table = []
    for batch in options.batch:

        def inputs(batch: int = batch) -> Tensor:
            at = int(torch.randint(len(pool) - batch + 1, ()))
            return pool[at : at + batch].clone()

        calls = max(1, min(15, 256 // batch))
        seconds = measure(contenders, inputs, options.rounds, calls)
        row: dict[str, Any] = {"dtype": dtype_name, "batch": batch, "huge_pages": huge}
        for name, values in seconds.items():
            row[name] = summary(values, batch * options.layers)
        for ours in ("kernel", "module"):
            for neurons in options.neurons:
                best = zip(*(seconds[f"dense {neurons} on {count}"] for count in threads), strict=True)
                ratios = [min(d) / k for d, k in zip(best, seconds[ours], strict=True)]
                row[f"{ours} over dense {neurons}"] = round(statistics.median(ratios), 1)
        table.append(row)
        print(
            f"{dtype_name:9} batch {batch:5}: "
            + ", ".join(f"{name} {row[name]['us']} us" for name in contenders)
            + "; "
            + ", ".join(f"{name} {row[name]}x" for name in row if " over " in name),
            flush=True,
        )
    return table, visited


def training(options: argparse.Namespace) -> dict[str, Any]:
    """A step (forward and backward, without the optimizer) of one layer in float32."""
    layer = FastFeedForward(options.width, options.depth)

    def step(method: str) -> Contender:
        def run(x: Tensor) -> Tensor:
            layer.method = method
            layer.zero_grad(set_to_none=True)
            y: Tensor = layer(x.requires_grad_())
            y.square().mean().backward()
            return y

        return run

    def inputs() -> Tensor:
        return torch.randn(options.training_batch, options.width)

    seconds = measure({name: step(name) for name in ("sparse", "masked")}, inputs, options.rounds, 1)
    ratios = [m / s for m, s in zip(seconds["masked"], seconds["sparse"], strict=True)]
    row = {
        "batch": options.training_batch,
        **{name: summary(values, 1) for name, values in seconds.items()},
        "sparse over masked": round(statistics.median(ratios), 1),
    }
    print(
        f"training step, batch {options.training_batch}: sparse {row['sparse']['us']} us, "
        f"masked {row['masked']['us']} us: {row['sparse over masked']}x"
    )
    return row


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--depth", type=int, default=11)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--neurons", type=int, nargs="*", default=[4095, 3072], help="of the dense layers")
    arguments.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 128, 1024, 4096])
    arguments.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    arguments.add_argument("--training-batch", type=int, default=512)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "benchmark": "fast_feedforward_cpu", "width": options.width, "depth": options.depth,
        "layers": options.layers, "unit": "us a token and layer", "inference": [], "leaves_visited": {},
    }  # fmt: skip
    for name in options.dtypes:
        with torch.inference_mode():
            rows, visited = inference(options, name)
        result["inference"] += rows
        result["leaves_visited"][name] = visited
    result["training_step"] = training(options)
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, "cpu")


if __name__ == "__main__":
    main()

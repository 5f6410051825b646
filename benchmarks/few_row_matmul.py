"""Few-row products on a GPU: how near they come to the rate at which it reads memory.

First every kind of launch is compared with its twin, in float32 and bfloat16. Then each product of a model's step is timed
in a CUDA graph of many calls whose weights are copies, in turn, that the L2 cache cannot hold (`us`: one call, with its
norm and residual; of several rows the product in front leaves what the norm needs); beside it PyTorch's `linear` on the
same bfloat16 copies with nothing around it. `share` is the weights' bytes over the time, against the rate of reading a
large buffer in the same run. `step_us` sums a model's matrices: layers times its four products, and the head.

    python -m benchmarks.few_row_matmul --output benchmarks/results/few_row_matmul.nvidia-h100-80gb-hbm3.json

`--tune` measures the candidates of `engine/cuda/tuning.py` first and writes the winners where the kernels look for them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional

from benchmarks.common import parser
from shoestring.engine.cuda.candidates import candidates
from shoestring.engine.cuda.linear import (
    gated_linear,
    linear,
    linear_twin,
)
from shoestring.engine.cuda.products import (
    Launch,
    LinearWorkspace,
    Product,
    ScaledRows,
    launches,
    widest_left,
)
from shoestring.engine.cuda.tuning import (
    MAX_ROWS,
    TUNED,
    LaunchConfig,
    Problem,
    Tuning,
    heuristic,
)
from shoestring.engine.cuda.weights import DeviceWeight, pack_weight
from shoestring.evaluation.results import machine_name, write_result

# name: (N, K, under a norm, gated, added to the residual stream), a layer's four and the head
MODELS: dict[str, tuple[int, dict[str, tuple[int, int, bool, bool, bool]]]] = {
    "smollm2-135m": (30, {
        "qkv": (960, 576, True, False, False), "output": (576, 576, False, False, True),
        "gate_up": (1536, 576, True, True, False), "down": (576, 1536, False, False, True),
        "head": (49152, 576, False, False, False),
    }),
    "7b": (32, {
        "qkv": (12288, 4096, True, False, False), "output": (4096, 4096, False, False, True),
        "gate_up": (11008, 4096, True, True, False), "down": (4096, 11008, False, False, True),
        "head": (32000, 4096, False, False, False),
    }),
    "8b": (32, {
        "qkv": (6144, 4096, True, False, False), "output": (4096, 4096, False, False, True),
        "gate_up": (14336, 4096, True, True, False), "down": (4096, 14336, False, False, True),
        "head": (128256, 4096, False, False, False),
    }),
}  # fmt: skip
DEVICE = "cuda"
ONLY = (
    "one_row",
    "few_rows",
    "whole_rows",
    "fragments",
    "wide_tiles",
    *(one.name for one in fields(LaunchConfig)),
)
"""Kernels and fields, to try the launches of one or with one."""


@dataclass(frozen=True)
class RowNorm:
    gain: torch.Tensor
    epsilon: float = 1e-5
    adds_one: bool = False


class Case:
    """One product with all it needs: copies of its weights, inputs, output."""

    def __init__(self, model: str, name: str, kind: str, rows: int, workspace: LinearWorkspace) -> None:
        self.outputs, self.inputs, self.normed, self.gated, self.added = MODELS[model][1][name]
        self.name, self.rows, self.workspace = name, rows, workspace
        # A model is most sensitive to its head, so it is int8 at least.
        self.kind = "int8" if name == "head" and kind == "int4" else kind
        self.problem = Problem(self.outputs, self.inputs, rows, self.kind, self.gated)
        first = random_weight(self.outputs, self.inputs, self.kind)
        self.nbytes = first.nbytes * (2 if self.gated else 1)
        self.count = max(2, min(400, -(-200_000_000 // self.nbytes)))  # the L2 cache holds 50 MB
        self.weights = [first, *(copied(first) for _ in range(self.count * (2 if self.gated else 1) - 1))]
        wide = torch.float32 if self.normed else torch.bfloat16  # the residual stream is float32
        self.x = torch.randn(rows, self.inputs, device=DEVICE, dtype=wide)
        self.norm = (
            RowNorm(torch.ones(self.inputs, device=DEVICE, dtype=torch.bfloat16)) if self.normed else None
        )
        # As in a model: the product in front has left its rows for the norm, where they are not too wide.
        self.scaled = (
            ScaledRows(self.x.bfloat16(), torch.ones(self.inputs // 16, rows, device=DEVICE))
            if self.normed and self.inputs <= widest_left(rows)
            else None
        )
        self.next_norm = (
            RowNorm(torch.ones(self.outputs, device=DEVICE, dtype=torch.bfloat16)) if self.added else None
        )
        kept = torch.float32 if self.added or name == "head" else torch.bfloat16
        self.out = torch.zeros(rows, self.outputs, device=DEVICE, dtype=kept)

    def call(self, turn: int, tuning: Tuning, config: LaunchConfig | None) -> None:
        extras: dict[str, Any] = {
            "norm": self.norm, "scaled": self.scaled, "workspace": self.workspace, "tuning": tuning, "config": config,
        }  # fmt: skip
        at = turn % self.count
        if self.gated:
            gated_linear(self.x, self.weights[2 * at], self.weights[2 * at + 1], self.out, **extras)
        else:
            residual = self.out if self.added else None
            linear(self.x, self.weights[at], self.out, residual=residual, next_norm=self.next_norm, **extras)

    def torch_call(self, turn: int) -> None:
        at, x = turn % self.count, self.x.bfloat16() if self.normed else self.x
        if self.gated:
            functional.linear(x, self.weights[2 * at].values)
            functional.linear(x, self.weights[2 * at + 1].values)
        else:
            functional.linear(x, self.weights[at].values)

    def launches(self, tuning: Tuning, config: LaunchConfig | None) -> Iterator[Launch]:
        up = self.weights[1] if self.gated else None
        product = Product(
            self.x, self.weights[0], up, self.out, self.norm, residual=self.out if self.added else None,
            activation="silu" if self.gated else None, scaled=self.scaled, next_norm=self.next_norm,
        )  # fmt: skip
        return launches(product, self.workspace, tuning, config)


def random_weight(outputs: int, inputs: int, kind: str) -> DeviceWeight:
    """A weight of plausible numbers; quantised ones are not searched for, only filled."""
    if kind == "bfloat16":
        return pack_weight(torch.randn(outputs, inputs, device=DEVICE, dtype=torch.bfloat16) * inputs**-0.5)
    found = pack_weight(torch.randn(64, inputs, device=DEVICE, dtype=torch.bfloat16) * inputs**-0.5, kind)
    assert found.scales is not None
    times = -(-outputs // 64)
    return replace(
        found, outputs=outputs, values=found.values.repeat(times, 1)[:outputs].contiguous(),
        scales=found.scales.repeat(1, times)[:, :outputs].contiguous(),
    )  # fmt: skip


def copied(weight: DeviceWeight) -> DeviceWeight:
    scales = None if weight.scales is None else weight.scales.clone()
    return replace(weight, values=weight.values.clone(), scales=scales)


def microseconds(call: Callable[[int], None], calls: int, rounds: int = 7) -> list[float]:
    """Times of one call, from replays of a graph of many."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for turn in range(2):
            call(turn)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for turn in range(calls):
                call(turn)
        graph.replay()
        times = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / calls)
    return times


def read_rate() -> float:
    """Bytes a second of reading a buffer far larger than the cache (its sum or its largest), the best of twenty."""
    buffer = torch.ones(1 << 30, dtype=torch.float32, device=DEVICE)
    times = []
    for _ in range(11):
        for reduce in (torch.sum, torch.amax):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            reduce(buffer)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return buffer.nbytes / min(times[2:])


CHECKED = [
    *((torch.bfloat16, kind, shape) for kind in (None, "int8", "int4") for shape in (
        (960, 576, 1), (960, 576, 16), (1000, 1504, 1), (1000, 1504, 8), (1000, 1504, 64), (1000, 1504, 200),
        (1000, 1504, 300), (4096, 4096, 1), (4096, 4096, 16),
    )),
    *((torch.float32, kind, (1000, 1504, rows)) for kind in (None, "int8", "int4") for rows in (1, 8, 64)),
    *((torch.float16, kind, (1000, 1504, rows)) for kind in (None, "int4") for rows in (1, 16)),
]  # fmt: skip


def check(tuning: Tuning) -> list[str]:
    """Results against float64, beside PyTorch's own in the same type; returns what is out of bounds."""
    workspace = LinearWorkspace.allocate(DEVICE, width=4096)
    torch.manual_seed(0)
    made = []
    for dtype, kind, (outputs, inputs, rows) in CHECKED:
        for gated in (False, True):
            weights = [
                pack_weight(torch.randn(outputs, inputs, device=DEVICE, dtype=dtype) * inputs**-0.5, kind)
                for _ in range(2 if gated else 1)
            ]
            x = torch.randn(rows, inputs, device=DEVICE)
            norm = RowNorm(torch.rand(inputs, device=DEVICE, dtype=dtype) + 0.5)
            residual = None if gated else torch.randn(rows, outputs, device=DEVICE)
            made.append(
                (f"{dtype} {kind} {outputs}x{inputs} rows {rows} gated {gated}", weights, x, norm, residual)
            )
    with background():
        for _, weights, x, norm, residual in made:
            if len(x) <= MAX_ROWS:
                out = torch.empty(len(x), weights[0].outputs, device=DEVICE)
                up = weights[1] if len(weights) == 2 else None
                added = None if residual is None else out
                activation = "silu" if up else None
                product = Product(x, weights[0], up, out, norm, residual=added, activation=activation)
                for launch in launches(product, workspace, tuning):
                    launch.compile()
    wrong = []
    for case, weights, x, norm, residual in made:
        extras: dict[str, Any] = {"norm": norm, "workspace": workspace, "tuning": tuning}
        outs = []
        for _ in range(2):
            out = torch.full((len(x), weights[0].outputs), float("nan"), device=DEVICE)
            if residual is None:
                gated_linear(x, weights[0], weights[1], out, **extras)
            else:
                out.copy_(residual)
                linear(x, weights[0], out, residual=out, **extras)
            outs.append(out)
        activation = "silu" if residual is None else None
        exact = linear_twin(x.double(), *weights, norm=norm, activation=activation, dtype=torch.float64)
        plain = linear_twin(x, *weights, norm=norm, activation=activation, dtype=weights[0].dtype).double()
        if residual is not None:
            exact, plain = exact + residual, plain + residual
        ours, theirs = (float((found - exact).norm() / exact.norm()) for found in (outs[0], plain))
        if not ours <= max(2 * theirs, 2e-6):
            wrong.append(f"{case}: {ours:.2g}, PyTorch's own {theirs:.2g}")
        if not torch.equal(*outs):
            wrong.append(f"{case}: differs from run to run")
    if workspace.arrived.any():
        wrong.append("arrival counters are not zero")
    print(f"{len(made)} cases checked, {len(wrong)} wrong", flush=True)
    return wrong


@contextmanager
def background() -> Iterator[None]:
    """What is compiled in here is compiled on all cores; what fails will fail again where it is run."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        yield


def cases(
    options: Any, models: list[str], workspace: LinearWorkspace
) -> Iterator[tuple[str, str, int, str, Case]]:
    for model in models:
        for kind in options.types:
            for rows in options.rows:
                for name in MODELS[model][1]:
                    yield model, kind, rows, name, Case(model, name, kind, rows, workspace)


def wanted(case: Case, only: str | None) -> list[LaunchConfig]:
    """The candidates, or those of one kernel or with one field; where there is no norm to fuse, each once."""
    found = candidates(case.problem)
    if only is not None:
        found = [one for one in found if one.kernel == only or asdict(one).get(only)]
    if case.normed and (case.scaled is None or case.rows == 1):
        return found
    return [replace(one, fuse_norm=heuristic(case.problem).fuse_norm) for one in found]


def tune(options: Any, workspace: LinearWorkspace, base: Tuning) -> Tuning:
    """Measure the candidates of every problem and keep the winners."""
    began = time.monotonic()
    winners = dict(base.configs)
    timed = 0
    for model in options.models:  # one model's copies at a time
        problems = {case.problem.key: case for *_, case in cases(options, [model], workspace)}
        choices = {
            key: list(dict.fromkeys([base.config(case.problem), *wanted(case, options.tune_only)]))
            for key, case in problems.items()
        }
        with background():
            for key, case in problems.items():
                for config in choices[key]:
                    for launch in case.launches(base, config):
                        launch.compile()
        print(f"{model}: compiled after {time.monotonic() - began:.0f} s", flush=True)
        for key, case in problems.items():
            if time.monotonic() - began > options.tune_seconds:
                print("out of time: the heuristic stays for", key, flush=True)
                continue
            found = []
            for config in choices[key]:
                try:
                    calls = case.count * max(1, 60 // case.count)
                    times = microseconds(partial(case.call, tuning=base, config=config), calls, rounds=5)
                    found.append((statistics.median(times), config))
                    timed += 1
                except Exception as error:
                    print("does not run:", key, config, str(error).splitlines()[0][:120], flush=True)
            if not found:
                continue
            best = min(found, key=lambda one: one[0])
            winners[key] = best[1]
            times_of = {config: f"{time_:.2f}" for time_, config in found}
            known, first = (times_of.get(one, "-") for one in (choices[key][0], heuristic(case.problem)))
            print(f"{key:40} {best[0]:8.2f} us (known {known}, heuristic {first}) {best[1]}", flush=True)
        problems.clear()
        torch.cuda.empty_cache()
    print(f"{timed} timed in {time.monotonic() - began:.0f} s", flush=True)
    return replace(base, configs=winners, capability=torch.cuda.get_device_capability(DEVICE))


def measure(options: Any, workspace: LinearWorkspace, tuning: Tuning, rate: float) -> list[dict[str, Any]]:
    rows = []
    for model, kind, count, name, case in cases(options, options.models, workspace):
        calls = case.count * max(1, 120 // case.count)
        config = tuning.config(case.problem)
        times = microseconds(partial(case.call, tuning=tuning, config=None), calls)
        median = statistics.median(times)
        row = {
            "model": model, "type": kind, "rows": count, "product": name, "shape": [case.outputs, case.inputs],
            "us": round(median, 2), "us_range": [round(min(times), 2), round(max(times), 2)],
            "share": round(case.nbytes / (median * 1e-6) / rate, 3),
            "config": f"{config.kernel} {config.block_n}x{config.block_k}x{config.block_m}/{config.split_k}",
        }  # fmt: skip
        if kind == "bfloat16":
            theirs = statistics.median(microseconds(case.torch_call, calls))
            row["torch_us"] = round(theirs, 2)
            row["torch_share"] = round(case.nbytes / (theirs * 1e-6) / rate, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over a step's matrices."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["model"], row["type"], row["rows"])
        total = found.setdefault(
            key, dict(zip(("model", "type", "rows"), key, strict=True)) | {"step_us": 0.0}
        )
        times = 1 if row["product"] == "head" else MODELS[row["model"]][0]
        total["step_us"] = round(total["step_us"] + times * row["us"], 1)
        if "torch_us" in row:
            total["torch_step_us"] = round(total.get("torch_step_us", 0.0) + times * row["torch_us"], 1)
    return list(found.values())


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--models", nargs="*", default=list(MODELS))
    arguments.add_argument("--types", nargs="*", default=["bfloat16", "int8", "int4"])
    arguments.add_argument("--rows", nargs="*", type=int, default=[1, 16, 64])
    arguments.add_argument(
        "--pdl", action=argparse.BooleanOptionalAction, default=None, help="programmatic dependent launch"
    )
    arguments.add_argument("--no-check", action="store_true")
    arguments.add_argument("--tune", action="store_true")
    arguments.add_argument(
        "--tune-only",
        choices=ONLY,
        metavar="NAME",
        help="try only launches of this kernel or with this field, beside what is known",
    )
    arguments.add_argument("--tune-seconds", type=float, default=200)
    arguments.add_argument("--winners", type=Path, help="where --tune writes (and a plain run reads) winners")
    options = arguments.parse_args()
    machine = machine_name(DEVICE)
    winners = options.winners or TUNED / f"{machine}.json"
    tuning = Tuning.read(winners) if winners.is_file() else Tuning.of_machine(torch.device(DEVICE))
    if options.pdl is not None:
        tuning = replace(tuning, pdl=options.pdl)
    wrong = [] if options.no_check else check(tuning)
    for line in wrong:
        print("WRONG", line, flush=True)
    workspace = LinearWorkspace.allocate(DEVICE, width=11008)
    rate = read_rate()
    print(f"{machine} reads {rate / 1e12:.2f} TB/s", flush=True)
    if options.tune:
        tuning = tune(options, workspace, tuning)
        tuning.write(winners)
    table = measure(options, workspace, tuning, rate)
    result: dict[str, Any] = {
        "benchmark": "few_row_matmul", "read_tb_per_second": round(rate / 1e12, 3), "pdl": tuning.pdl,
        "tuned": bool(tuning.configs), "checked": not options.no_check, "wrong": wrong, "steps": steps(table),
        "table": table,
    }  # fmt: skip
    for step in result["steps"]:
        print(json.dumps(step))
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, DEVICE)


if __name__ == "__main__":
    main()

"""Launches tuned within the step: the product that is fastest alone need not be so between others.

What a launch leaves of the multiprocessors decides how early the next one's weights are under way. So each candidate is put
into the step of so many rows, one product after another, and the graph of the whole step is timed; what is faster there
stays. Winners are written where the kernels look for them. Begin with `few_row_matmul --tune`, which is quicker and knows
of more candidates.

    python -m benchmarks.tune_step --subject 135m --rows 8 16 24 32 --only whole_rows
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_row_matmul import ONLY, Case, background, wanted
from benchmarks.gpu_step_cost import SHAPES, binary_tree, module_of, prepare, take, timed_replay
from shoestring.engine.cuda.products import LinearWorkspace
from shoestring.engine.cuda.tuning import TUNED, LaunchConfig, Problem, Tuning
from shoestring.evaluation.results import machine_name

MODEL_OF = {"135m": "smollm2-135m", "7b": "7b", "8b": "8b"}
"""The shapes' names in `few_row_matmul`."""
NEIGHBOURS = "neighbours"
_LEAST_GAIN = 0.005
"""Of a step's time; less may be noise."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--subject", choices=list(SHAPES), default="135m")
    arguments.add_argument("--kind", default="bfloat16", help="bfloat16, int8 or int4 weights")
    arguments.add_argument("--rows", type=int, nargs="*", default=[8, 16, 24, 32])
    arguments.add_argument("--products", nargs="*", default=["gate_up", "down", "qkv", "output"])
    arguments.add_argument(
        "--only",
        choices=(NEIGHBOURS, *ONLY),
        metavar="NAME",
        help=f"launches of this kernel or with this field, beside other numbers of rows' ({NEIGHBOURS}: these alone)",
    )
    arguments.add_argument(
        "--late", action="store_true", help="each also with the next kernel started later (several rows)"
    )
    arguments.add_argument("--context", type=int, default=200)
    arguments.add_argument("--seconds", type=float, default=200, help="try nothing new after so many")
    arguments.add_argument("--winners", type=Path, help="the file to begin from and to write")
    options = arguments.parse_args()
    began = time.monotonic()

    from shoestring.engine.cuda import cuda_runner_of

    quantize = None if options.kind == "bfloat16" else options.kind
    runner = cuda_runner_of(module_of(options.subject, torch.bfloat16), quantize=quantize)
    file = options.winners or TUNED / f"{machine_name('cuda')}.json"
    if file.is_file():
        runner.tuning = Tuning.read(file)
    workspace = LinearWorkspace.allocate("cuda", width=11008)
    choices: dict[int, dict[str, tuple[str, list[LaunchConfig]]]] = {}
    for rows in options.rows:
        choices[rows] = {}
        with background():
            for name in options.products:
                case = Case(MODEL_OF[options.subject], name, options.kind, rows, workspace)
                known = runner.tuning.config(case.problem)
                found = [known, *neighbours(case.problem, runner.tuning)]
                if options.only != NEIGHBOURS:
                    found += wanted(case, options.only)
                if options.late and rows > 1:
                    found = [replace(one, late=late) for one in found for late in (False, True)]
                found = list(dict.fromkeys(found))
                for config in found:
                    for launch in case.launches(runner.tuning, config):
                        launch.compile()
                choices[rows][name] = case.problem.key, found
                del case
    torch.cuda.empty_cache()
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    prepare(runner, 1, options.context)
    for rows in options.rows:
        step = TunedStep(runner, rows)
        first = step.milliseconds(100)
        for name, (key, found) in choices[rows].items():
            left = options.seconds - (time.monotonic() - began)
            step.try_all(key, found, left)
            print(f"{rows} rows, {name}: {step.best:.4f} ms, {runner.tuning.configs.get(key)}", flush=True)
        print(f"{rows} rows: {first:.4f} -> {step.best:.4f} ms", flush=True)
    replace(runner.tuning, capability=torch.cuda.get_device_capability()).write(file)


def neighbours(problem: Problem, tuning: Tuning) -> list[LaunchConfig]:
    """What serves other numbers of rows of the same matrix."""
    others = [replace(problem, rows=rows).key for rows in (8, 16, 24, 32, 64, 128, 256) if problem.rows > 1]
    return [tuning.configs[key] for key in others if key in tuning.configs and key != problem.key]


class TunedStep:
    """A step of so many rows of one sequence, whose launches can be exchanged."""

    def __init__(self, runner: Any, rows: int) -> None:
        self.runner, self.rows = runner, rows
        self.trees = {0: binary_tree(rows, runner.vocab_size)}
        self.best = self.milliseconds(100)

    def milliseconds(self, repeats: int) -> float:
        """The median time of its graph."""
        for _ in range(3):
            take(self.runner, self.trees)
        median: float = timed_replay(self.runner.steps.get(1, self.rows, 1), repeats)["median"]
        return median

    def launch(self, key: str, config: LaunchConfig | None) -> None:
        """Launch a product so from now on (None: as the heuristic would)."""
        tuning = self.runner.tuning
        configs = {name: known for name, known in tuning.configs.items() if name != key}
        self.runner.tuning = replace(tuning, configs=configs | ({key: config} if config else {}))

    def try_all(self, key: str, found: list[LaunchConfig], seconds: float) -> None:
        """Keep the best of these for a product, or what it has."""
        began = time.monotonic()
        known = self.runner.tuning.configs.get(key)
        times = []
        for config in found:
            if config == known or time.monotonic() - began > seconds:
                continue
            self.launch(key, config)
            try:
                times.append((self.milliseconds(20), config))
            except Exception as error:
                print("does not run:", key, config, str(error).splitlines()[0][:120], flush=True)
        # The best few once more, between two looks at what there was: clocks drift.
        finals: dict[LaunchConfig | None, list[float]] = {}
        for _ in range(2):
            for config in [known, *(config for _, config in sorted(times, key=lambda one: one[0])[:4])]:
                self.launch(key, config)
                finals.setdefault(config, []).append(self.milliseconds(60))
        settled = {config: statistics.mean(both) for config, both in finals.items()}
        winner = min(settled, key=lambda config: settled[config])
        if settled[winner] > (1 - _LEAST_GAIN) * settled[known]:
            winner = known
        self.launch(key, winner)
        self.best = settled[winner]


if __name__ == "__main__":
    main()

"""What a step costs by its rows, measured on this machine, and how many rows that makes worthwhile."""

import hashlib
import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoestring.engine.runner import Outputs, Runner
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree

__all__ = [
    "ROW_COUNTS",
    "TAUGHT",
    "StepCost",
    "best_rows",
    "fingerprint",
    "measure_step_cost",
    "remembered_step_cost",
]

TAUGHT = 0.01
"""Tokens that a drafted row is worth beside its chance: what it shows of likely successors serves later drafts."""
ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
_CONTEXT = 192
_TUNING_SLOT = -1
_LEAST_SECONDS, _MOST_REPETITIONS = 0.06, 24


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step by its rows, for increasing row counts.

    Args:
        stairs: rows between two counts take what the greater one does; else what lies between.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    stairs: bool = False

    @cached_property
    def _monotone(self) -> list[float]:
        # More rows never cost less: what was measured cheaper at more rows is cheap at fewer too.
        seconds = list(self.seconds)
        for index in range(len(seconds) - 2, -1, -1):
            seconds[index] = min(seconds[index], seconds[index + 1])
        return seconds

    @cached_property
    def _tables(self) -> dict[int, np.ndarray]:
        return {}  # by batch, as far as steps were measured

    @property
    def most_rows(self) -> int:
        """The most rows that were measured."""
        return self.rows[-1]

    def of(self, rows: int) -> float:
        """Seconds of a step with so many rows (beyond what was measured: in proportion)."""
        seconds = self._monotone
        if rows >= self.rows[-1]:
            return seconds[-1] * rows / self.rows[-1]
        above = bisect_left(self.rows, rows)
        if not above or self.stairs:
            return seconds[above]
        low, high = self.rows[above - 1], self.rows[above]
        cheap, dear = seconds[above - 1], seconds[above]
        return cheap + (dear - cheap) * (rows - low) / (high - low)

    def pays(self) -> bool:
        """Whether any number of rows would be worth its time if half of their tokens were right.

        Where not even that pays, drafting never will; how much of a draft is right shows while decoding.
        """
        plain = self.of(1)
        return any((1 + (count - 1) / 2) * plain > self.of(count) for count in self.rows[1:])

    def best_rows(self, chances: Sequence[float] | np.ndarray, batch: int = 1) -> int:
        """How many drafted rows, taken in order, give the most expected tokens per second.

        `chances[i]` is the chance that row i is accepted; each of `batch` sequences drafts alike.
        """
        return best_rows(chances, self.table(len(chances), batch))

    def table(self, rows: int, batch: int = 1) -> np.ndarray:
        """Seconds of a step with 0, 1, ..., `rows` drafted rows for each of `batch` sequences: float64 [rows + 1]."""
        table = self._tables.get(batch)
        if table is None or len(table) <= rows:
            each, stair = _stairs(self.rows, max(rows + 1, self.most_rows // batch), batch)
            if self.stairs:
                table = np.array(self._monotone)[stair]
            else:
                table = np.interp(each, self.rows, self._monotone)
            if each[-1] > self.most_rows:
                table = np.where(each > self.most_rows, self._monotone[-1] * each / self.most_rows, table)
            table.setflags(write=False)
            self._tables[batch] = table
        return table[: rows + 1]


@lru_cache(maxsize=64)
def _stairs(rows: tuple[int, ...], most: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of steps with 1 to `most` for each sequence, and which measured count is the next one: a cost that steps
    correct makes its table often.
    """
    each = batch * np.arange(1, most + 1)
    return each, np.searchsorted(rows, each).clip(max=len(rows) - 1)


def best_rows(chances: Sequence[float] | np.ndarray, seconds: np.ndarray) -> int:
    """How many rows, taken in order, give the most expected tokens in the seconds of a step with 0, 1, ... of them.

    Each is worth its chance and `TAUGHT`.
    """
    expected = np.cumsum([1.0, *(chance + TAUGHT for chance in chances)])
    # The first of the best: a row that gains nothing is left out.
    return int(np.argmax(expected / seconds[: len(expected)]))


def measure_step_cost(
    runner: Runner,
    rows: Sequence[int] = ROW_COUNTS,
    repetitions: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> StepCost:
    """Time steps of a chain of rows behind a short context (a few seconds for a small model).

    A runner that rounds rows up is measured at the numbers that it rounds to.
    """
    stairs = tuple(count for count in runner.row_sizes if count <= rows[-1])
    rows = stairs or rows
    limit = runner.max_positions or 1 << 30
    context = max(1, min(_CONTEXT, limit // 2))
    rows = [count for count in rows if context + count < limit] or [1]
    vocabulary = runner.vocab_size
    # A graph's time depends on how many others there are (15% on an H200), and decoding will have all of them.
    runner.warm_up(1, progress)
    runner.open(_TUNING_SLOT, SamplingOptions())
    try:
        prompt = [(11 * i + 5) % vocabulary for i in range(context)]
        runner.step({_TUNING_SLOT: TokenTree.chain(prompt)}, Outputs({_TUNING_SLOT: []}))
        runner.commit({_TUNING_SLOT: range(context)})
        seconds = []
        for done, count in enumerate(rows):
            if progress is not None:
                progress(done, len(rows))
            tree = TokenTree.chain([(17 * i + 3) % vocabulary for i in range(count)])
            times: list[float] = []
            # Short steps are repeated until caches and threads are as warm as decoding keeps them.
            while len(times) <= repetitions or (
                sum(times) < _LEAST_SECONDS and len(times) < _MOST_REPETITIONS
            ):
                began = time.perf_counter()
                runner.step({_TUNING_SLOT: tree})[_TUNING_SLOT].next_token(0)
                times.append(time.perf_counter() - began)
            # The shortest: what else the machine does would be remembered as the cost of so many rows.
            seconds.append(min(times[len(times) // 2 :]))
        if progress is not None:
            progress(len(rows), len(rows))
    finally:
        runner.release(_TUNING_SLOT)
    return StepCost(tuple(rows), tuple(seconds), bool(stairs))


def fingerprint(runner: Runner, config: dict[str, Any], dtype: str, device: torch.device) -> str:
    """What a measurement of a model holds for: the model's shape, how its weights are stored, and this machine."""
    from shoestring import __version__

    config = {name: value for name, value in config.items() if name != "_name_or_path"}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads()
    facts = [
        config,
        dtype,
        str(device),
        runner.weights,
        runner.description,
        hardware,
        torch.__version__,
        __version__,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def remembered_step_cost(
    runner: Runner, path: Path, progress: Callable[[int, int], None] | None = None, anew: bool = False
) -> StepCost:
    """The cost in the file `path`, or a new measurement written there (`anew`: in any case)."""
    remembered = None if anew else _read(path, stairs=bool(runner.row_sizes))
    if remembered is not None:
        return remembered
    cost = measure_step_cost(runner, progress=progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"rows": cost.rows, "seconds": cost.seconds, "stairs": cost.stairs}))
        part.replace(path)
    except OSError:
        return cost  # a read-only cache only costs the measurement again next time
    return cost


def _read(path: Path, stairs: bool) -> StepCost | None:
    """A remembered cost; None where there is none, or none that this version has written for such a runner."""
    try:
        stored = json.loads(path.read_text())
        cost = StepCost(
            tuple(map(int, stored["rows"])), tuple(map(float, stored["seconds"])), bool(stored["stairs"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ordered = all(fewer < more for fewer, more in pairwise((0, *cost.rows)))
    positive = all(0 < value < math.inf for value in cost.seconds)
    whole = bool(cost.rows) and len(cost.rows) == len(cost.seconds) and cost.stairs == stairs
    return cost if whole and ordered and positive else None

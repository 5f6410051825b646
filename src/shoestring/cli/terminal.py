"""What commands share in talking to a person: results go to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from shoestring.training.task import Observer, Progress

__all__ = ["TextStream", "complain", "errors", "note", "output", "print_json", "progress", "training_line"]

_STAGES = {
    "download": "fetching",
    "extract": "unpacking",
    "hash": "verifying",
    "convert": "converting (once)",
    "load": "loading",
    "pack": "packing",
    "calibrate": "rounding the layers (GPTQ)",
    "measure": "timing this machine (once)",
    "write": "letting the model write what drafts come from (once)",
    "warm up": "compiling steps",
}
_DRAFTED = "green"


@cache
def output() -> "Console":
    """The console on stdout."""
    from rich.console import Console

    # A pipe has no width: what reads it wants whole lines.
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)


@cache
def errors() -> "Console":
    """The console on stderr: progress, notes, failures."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Say something that is not a result."""
    errors().print(text, style="dim", markup=False)


def complain(text: str) -> None:
    """Say what went wrong, in one line."""
    print(f"shoestring: {text}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on stderr, fed as `(stage, done, total)`; it vanishes at the end. Silent where stderr is a file."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=errors(), transient=True)
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int | None) -> None:
        if stage not in tasks:
            for task in tasks.values():
                bar.remove_task(task)
            tasks.clear()
            tasks[stage] = bar.add_task(_STAGES.get(stage, stage), total=total, amount="")
            if errors().is_terminal:
                bar.start()
        in_bytes = stage in ("download", "extract", "hash") and total
        amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB" if in_bytes and total else ""
        bar.update(tasks[stage], completed=done, total=total, amount=amount)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def training_line() -> Iterator["Observer"]:
    """A live line of a training run on stderr; where stderr is a file, a line for each report."""
    live = errors().is_terminal
    status = errors().status("preparing") if live else None

    def observe(progress: "Progress") -> None:
        numbers = "  ".join(
            f"{name} {_short(value)}" for name, value in progress.values.items() if name != "seconds"
        )
        left = "" if progress.seconds_left is None else f"{_clock(progress.seconds_left)} left  "
        where = f"{progress.step}/{progress.steps}  " if progress.steps else ""
        if status is not None and progress.kind == "train":
            status.update(f"{where}{left}{numbers}")
        else:
            note(f"{progress.kind} {where}{left}{numbers}")

    if status is None:
        yield observe
    else:
        with status:
            yield observe


def _short(value: Any) -> str:
    return (
        f"{value:,.0f}"
        if isinstance(value, float) and abs(value) >= 1000
        else (f"{value:.3g}" if isinstance(value, float) else str(value))
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


class TextStream:
    """Text on stdout as it comes; what was accepted beyond the first token of a step is tinted on a terminal."""

    def __init__(self) -> None:
        self._tinted = output().is_terminal and not output().no_color

    def write(self, text: str, drafted: bool = False) -> None:
        """Write a piece at once."""
        if not text:
            return
        if drafted and self._tinted:
            output().print(text, end="", style=_DRAFTED, markup=False)
        else:
            sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """End the line."""
        self.write("\n")

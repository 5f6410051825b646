"""What commands share in talking to a person: results go to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TextStream", "complain", "errors", "note", "output", "print_json", "progress"]

_STAGES = {
    "download": "fetching",
    "extract": "unpacking",
    "hash": "verifying",
    "convert": "converting (once)",
    "load": "loading",
    "measure": "timing this machine (once)",
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

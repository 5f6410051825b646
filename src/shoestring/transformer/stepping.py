"""Running a search's steps: plainly, or recorded as CUDA graphs, of which each serves a window of positions."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["graph_window", "run_steps"]

_LOOK_EVERY = 4
_FIRST_WINDOW = 32


def run_steps(step: Callable[[int], None], done: Tensor, longest: int, *, graphs: bool) -> None:
    """Call `step(window)` for positions 0, 1, ... until all are `done` (looked at now and then) or `longest` is reached.

    A window is how many positions a step may see: with `graphs` rounded up, so that few graphs are recorded.
    """
    recorded: dict[int, torch.cuda.CUDAGraph] = {}
    for at in range(longest):
        window = graph_window(at, longest) if graphs else at + 1
        if not graphs or window not in recorded:
            step(window)  # for graphs the warm-up, too
        else:
            recorded[window].replay()
        if graphs and window not in recorded:
            recorded[window] = _record(step, window)
        if (at + 1) % _LOOK_EVERY == 0 and bool(done.all()):
            return


def graph_window(at: int, longest: int) -> int:
    """The smallest of 32, 64, 128, ... that holds position `at`, but not more than `longest`."""
    window = _FIRST_WINDOW
    while window <= at:
        window *= 2
    return min(window, longest)


def _record(step: Callable[[int], None], window: int) -> torch.cuda.CUDAGraph:
    """The step as a graph. Recording it changes nothing: it runs when it is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(window)
    return graph

"""What a model finds likely after each token alone: known before a text begins, and after tokens it did not have yet.

Token recycling (arXiv 2408.08696) starts from what other requests left behind; this table is the model's own, so that
nothing leaks between requests. It is measured once, in batches of rows below one first token: token ids in order, which
is by falling frequency in vocabularies that merges built, for as long as the time given lasts.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shoestring.decoding.kept_arrays import keep_array, kept_array
from shoestring.engine.runner import Outputs, Runner
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree

__all__ = ["WIDTH", "measure_successors", "remembered_successors"]

WIDTH = 8
_ROWS = 128
_SLOT = -3
# Tokens measured again to tell whether a table is this model's, and how many must agree.
_CHECKED, _SAME = 16, 12
_SECONDS, _LEAST_BATCHES = 6.0, 6


def measure_successors(
    runner: Runner,
    first: int,
    seconds: float = _SECONDS,
    progress: Callable[[int, int], None] | None = None,
    tokens: int | None = None,
) -> np.ndarray:
    """The `WIDTH` likeliest successors of each token behind the token `first`, best first: int32 [tokens, width].

    As many tokens, from id 0 on, as `seconds` allow, or `tokens`; none of a model so slow that few would be.
    """
    vocabulary = runner.vocab_size
    count, width = min(tokens or vocabulary, vocabulary), min(WIDTH, vocabulary)
    limit = runner.max_positions
    table: list[list[int]] = []
    if limit is not None and limit < 3:
        return np.zeros((0, width), np.int32)
    runner.open(_SLOT, SamplingOptions())
    began = time.perf_counter()
    try:
        while len(table) < count and (not table or time.perf_counter() - began < seconds):
            batch = range(len(table), min(len(table) + _ROWS, count))
            tree = TokenTree([first, *batch], [-1, *([0] * len(batch))])
            rows = range(1, len(batch) + 1)
            results = runner.step({_SLOT: tree}, Outputs({_SLOT: list(rows)}, top_k=width))[_SLOT]
            table += [results.top_k(row)[:width] for row in rows]
            if time.perf_counter() - began > seconds / _LEAST_BATCHES and len(table) == len(batch) < count:
                table = []
                break
            if progress is not None:
                progress(len(table), count)
    finally:
        runner.release(_SLOT)
    return np.array(table, np.int32).reshape(-1, width)


def remembered_successors(
    runner: Runner,
    first: int,
    path: Path,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The table in the file `path` where it is this model's, or a new one written there."""
    table = kept_array(path)
    if table is not None and _is_ours(table, runner, first):
        return np.ascontiguousarray(table)
    table = measure_successors(runner, first, progress=progress)
    keep_array(path, table)
    return table


def _is_ours(table: np.ndarray, runner: Runner, first: int) -> bool:
    """Whether the model still finds the same tokens likely: other weights may have the same shape."""
    vocabulary = runner.vocab_size
    if table.dtype != np.int32 or table.ndim != 2 or len(table) > vocabulary:
        return False
    if not len(table):
        return True  # the model was too slow
    if table.shape[1] != min(WIDTH, vocabulary) or table.min() < 0 or table.max() >= vocabulary:
        return False
    now = measure_successors(runner, first, tokens=min(_CHECKED, len(table)))
    agree = int((now[:, 0] == table[: len(now), 0]).sum())
    return agree * _CHECKED >= _SAME * len(now)

"""Where two texts of the same prompt part, and whether that was a tie: the yardstick of every exactness claim.

In fp32 two strategies give equal tokens, or part where two tokens nearly tie. In lower precision a token is right
if it lies within 2 ulp of the maximum of the plain one-row step, teacher-forced over the tokens before it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoestring.engine.runner import Outputs, Runner
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree

__all__ = ["Parting", "find_parting", "first_difference", "one_row_logits", "ulp"]

_ONE_ROW_SLOT = -3


@dataclass(frozen=True)
class Parting:
    """Where two texts part. `gap` is the difference of the two tokens' logits there, None where one text just ends.

    `worst_ulp`: over the other text's tokens from there on, the farthest below the one-row step's maximum.
    """

    at: int
    gap: float | None
    worst_ulp: float | None


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two sequences differ (the shorter one's length if it is a prefix); None if equal."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def find_parting(
    runner: Runner, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int], dtype: torch.dtype
) -> Parting | None:
    """Where `other` parts from `plain`, both behind `prompt`, measured with plain one-row steps; None if equal."""
    at = first_difference(plain, other)
    if at is None:
        return None
    if at >= min(len(plain), len(other)):
        return Parting(at, None, None)
    gap, worst = None, 0.0
    for index, logits in one_row_logits(runner, prompt, other, at):
        if index == at:
            gap = abs(float(logits[plain[at]] - logits[other[at]]))
        top = float(logits.max())
        worst = max(worst, (top - float(logits[other[index]])) / ulp(top, dtype))
    return Parting(at, gap, worst)


def one_row_logits(
    runner: Runner, prompt: Sequence[int], tokens: Sequence[int], start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Teacher-forced: (index, logits [V] in fp32) of the plain step before each of `tokens` from `start` on.

    The prompt runs in one chunk and then one row at a time, as plain decoding does it.
    """
    runner.open(_ONE_ROW_SLOT, SamplingOptions())
    try:
        for index, chunk in enumerate([list(prompt), *([token] for token in tokens[:-1])]):
            last = len(chunk) - 1
            wanted = Outputs({_ONE_ROW_SLOT: [last]}, logits=True)
            results = runner.step({_ONE_ROW_SLOT: TokenTree.chain(chunk)}, wanted)[_ONE_ROW_SLOT]
            if index >= start:
                yield index, results.logits(last).float()
            runner.commit({_ONE_ROW_SLOT: range(len(chunk))})
    finally:
        runner.release(_ONE_ROW_SLOT)


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of this size in the type that the logits were computed in."""
    return float(torch.finfo(dtype).eps) * 2.0 ** math.floor(math.log2(max(abs(value), 1e-30)))

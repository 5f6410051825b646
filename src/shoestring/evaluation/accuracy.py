"""Shares with their intervals, and what a classifier must beat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoestring.errors import RequestError

__all__ = ["Accuracy", "accuracy_of", "wilson_interval"]

_Z = 1.959963984540054  # of 95%


@dataclass(frozen=True)
class Accuracy:
    """How many of `examples` were right. `interval` is Wilson's, 95%; `majority_rate` what always the same answer gets."""

    accuracy: float
    interval: tuple[float, float]
    right: int
    examples: int
    majority_rate: float


def wilson_interval(right: int, examples: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927), which holds at 0 and 1, too.

    Raises:
        RequestError: no examples, or more right than there are.
    """
    if not 0 <= right <= examples or not examples:
        raise RequestError(f"{right} right of {examples} examples is no share")
    share = right / examples
    spread = _Z * math.sqrt(share * (1 - share) / examples + (_Z / (2 * examples)) ** 2)
    middle, scale = share + _Z**2 / (2 * examples), 1 + _Z**2 / examples
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return (low if right else 0.0), (high if right < examples else 1.0)  # rounding aside, they are that


def accuracy_of(predicted: Sequence[int], labels: Sequence[int]) -> Accuracy:
    """The accuracy of class numbers.

    Raises:
        RequestError: different numbers of them, or none.
    """
    if not labels or len(predicted) != len(labels):
        raise RequestError(f"{len(predicted)} predictions and {len(labels)} labels")
    right = sum(p == y for p, y in zip(predicted, labels, strict=True))
    majority = max(list(labels).count(kind) for kind in set(labels))
    return Accuracy(
        right / len(labels), wilson_interval(right, len(labels)), right, len(labels), majority / len(labels)
    )

"""Learning rates over steps, as factors of the peak: warm-up is linear, then each has its own way down."""

import math
from collections.abc import Callable

__all__ = ["schedule_factor"]


def schedule_factor(name: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """The factor of the peak learning rate at optimiser step `index` (from 0).

    `inverse_sqrt` (and `noam`, the same with its own peak) is arXiv 1706.03762, equation 3, divided by its peak.
    """

    def factor(index: int) -> float:
        step = index + 1
        if step <= warmup_steps:
            return step / warmup_steps
        if name == "constant":
            return 1.0
        if name in ("inverse_sqrt", "noam"):
            return math.sqrt(max(1, warmup_steps) / step)
        left = max(0.0, (steps - step + 1) / max(1, steps - warmup_steps))
        if name == "linear":
            return left
        assert name == "cosine", name
        return 0.5 * (1 + math.cos(math.pi * (1 - left)))

    return factor

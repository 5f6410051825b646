"""Which examples make up step k: a pure function of seed and k, so that a resumed run sees what it would have seen."""

import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler

__all__ = ["BatchSampler", "fixed_size_batches"]

Plan = Callable[[random.Random], Sequence[Sequence[int]]]


class BatchSampler(Sampler[list[int]]):
    """`count` batches of example indices, epoch after epoch.

    `plan(random)` gives an epoch's batches; its `random` is seeded with (seed, epoch). Of `processes` each takes every
    n-th batch.
    """

    def __init__(self, plan: Plan, count: int, seed: int, process: int = 0, processes: int = 1) -> None:
        self._plan, self._count, self._seed = plan, count, seed
        self._process, self._processes = process, processes

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        given = index = epoch = 0
        while given < self._count:
            batches = self._plan(random.Random(f"{self._seed}/{epoch}"))
            assert batches, "a plan gives at least one batch"
            for batch in batches:
                if given < self._count and index % self._processes == self._process:
                    yield list(batch)
                    given += 1
                index += 1
            epoch += 1


def fixed_size_batches(examples: int, size: int) -> Plan:
    """A plan that shuffles the examples and cuts them into batches of `size`; the last may be smaller."""

    def plan(random: random.Random) -> list[list[int]]:
        order = list(range(examples))
        random.shuffle(order)
        return [order[start : start + size] for start in range(0, examples, size)]

    return plan

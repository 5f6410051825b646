"""Whether drafting pays, by the clock: steps are timed as they come, and drafts that lose to plain steps rest.

What a step's rows cost is measured once, perhaps while the machine was busy, and without the drafter's own work. So the
steps that decoding takes correct that measurement, row count by row count, and the drafter plans with the corrected one.
And where drafting still gives fewer tokens per second than plain steps do (a text that repeats nothing, a long context),
drafts rest. How many tokens a step gives is mostly chance, so that a few steps say little: drafts go on until they have
lost as much time as a few plain steps take, and then rest until that is a small share of the time.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

from shoestring.decoding.tune import StepCost

__all__ = ["Governor"]

# Steps of a kind whose median says what one takes: a step that the machine kept waiting says nothing.
_REMEMBERED = 7
_WEIGHT = 0.25  # of a new time against what was known of steps of about as many rows
_ALLOWANCE = 0.025  # of the plain steps' time that drafts may lose in the long run
_MOST_PATIENCE = 4  # how many times longer than that drafts rest at most, where they lose again and again
_FADING = 0.01  # of a correction, at each plain step: what was too dear is tried again some time


class Governor:
    """Times the steps of a model's sequences, which share one step, and says whether the next one should draft.

    Args:
        limit: what drafts may lose before they rest, in plain steps.
        credit: what earlier wins may make up for, likewise.
        first: plain steps that come first, the first of them to warm up.
        refresh: a plain step is taken after so many drafting ones, so that its cost stays known.
        clock: seconds.
    """

    def __init__(
        self,
        limit: float = 4.0,
        credit: float = 12.0,
        first: int = 4,
        refresh: int = 32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limit, self._credit, self._refresh, self._clock = limit, credit, refresh, clock
        self.cost: StepCost | None = None
        self._measured: StepCost | None = None
        self._corrections: list[
            float | None
        ] = []  # factors of the measured seconds, None where no step was seen
        self._began: float | None = None  # the step that is under way
        self._ended = 0.0
        self._drafted, self._tokens, self._rows, self._counts, self._sequences = False, 0, 0, True, 0
        self._plain: deque[float] = deque(maxlen=_REMEMBERED)
        self._drafting: deque[float] = deque(maxlen=_REMEMBERED)
        self._balance = 0.0  # what drafts have won, in plain steps
        self._patience = 1
        self._resting, self._owed, self._since_plain = first, 0, 0

    def calibrate(self, measured: StepCost) -> StepCost:
        """The measured cost of a step as steps have corrected it so far."""
        if measured != self._measured:
            self._measured = self.cost = measured
            self._corrections = [None] * len(measured.rows)
        assert self.cost is not None, "set above"
        return self.cost

    def begins(self) -> None:
        """A text begins: it may repeat itself where the last one did not."""
        self._patience, self._resting = 1, min(self._resting, max(self._owed, 1))

    def drafts(self) -> bool:
        """Whether the step that begins now should draft. Called by every sequence that takes part in it."""
        if self._began is None or self._tokens:
            self._finish()
            self._began, self._tokens, self._rows, self._counts, self._sequences = (
                self._clock(),
                0,
                0,
                True,
                0,
            )
            self._drafted = self._resting <= 0
        self._sequences += 1
        return self._drafted

    def ends(self, tokens: int, rows: int = 1, counts: bool = True) -> None:
        """The step took so many rows of one sequence and emitted tokens; one that also read a prompt does not count."""
        self._tokens += tokens
        self._rows += rows
        self._ended = self._clock()
        self._counts = self._counts and counts

    def _finish(self) -> None:
        """Judge the step that is over."""
        if self._began is None or not self._counts:
            return
        seconds, share = self._ended - self._began, self._tokens / max(1, self._sequences)
        if not self._drafted:
            self._plain.append(seconds)
            self._correct(self._rows, statistics.median(self._plain))
            self._resting, self._owed, self._since_plain = self._resting - 1, max(0, self._owed - 1), 0
            return
        if self._rows > self._sequences:
            self._correct(self._rows, seconds)
        self._since_plain += 1
        if self._since_plain >= self._refresh:
            self._resting = 1
        plain = statistics.median(self._plain) if self._plain else 0.0
        if plain <= 0:
            return
        self._drafting.append(seconds)
        won = share - statistics.median(self._drafting) / plain
        self._balance = min(self._credit, self._balance + won)
        if self._balance >= self._credit / 2:
            self._patience = 1
        if self._balance < -self._limit:
            self._owed = math.ceil(-self._balance / _ALLOWANCE)
            self._resting = self._patience * self._owed
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
            self._balance = 0.0

    def _correct(self, rows: int, seconds: float) -> None:
        """Let the time of a step of `rows` rows correct the measured cost."""
        measured = self._measured
        if measured is None:
            return
        nearest = min(range(len(measured.rows)), key=lambda i: abs(measured.rows[i] - rows))
        factor, known = seconds / measured.of(rows), self._corrections[nearest]
        if not self._drafted:
            # What a plain step takes is a median already; other corrections fade towards its own.
            self._corrections = [
                None if other is None else other + _FADING * (factor - other) for other in self._corrections
            ]
            known = None
        self._corrections[nearest] = factor if known is None else known + _WEIGHT * (factor - known)
        seen = [i for i, other in enumerate(self._corrections) if other is not None]
        factors = [self._corrections[min(seen, key=lambda s: abs(s - i))] for i in range(len(measured.rows))]
        self.cost = StepCost(
            measured.rows,
            tuple(base * (factor or 1.0) for base, factor in zip(measured.seconds, factors, strict=True)),
        )

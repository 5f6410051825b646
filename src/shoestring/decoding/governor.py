"""Whether drafting pays, by the clock: steps are timed as they come, and drafts that lose to plain steps rest.

What a step's rows cost is measured once, perhaps while the machine was busy, and without the drafter's own work. So the
steps that decoding takes correct that measurement, row count by row count, and the drafter plans with the corrected one.
And where drafting still gives fewer tokens per second than plain steps do (a text that repeats nothing, a long context),
drafts rest for a while, twice as long each time, and at least until what the trial lost is a small share of the time.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

from shoestring.decoding.tune import StepCost

__all__ = ["Governor"]

_PLAIN_STEPS = 7  # the latest of them say what a plain step takes: their median
_WEIGHT = 0.25  # of a new time against what was known of steps of about as many rows
_ENDINGS = ((3, 0.75), (2, 0.25))  # a trial ends after so many steps where it is this far behind plain ones
_ALLOWANCE = 0.025  # of the plain steps' time that lost trials may cost in the long run
_FADING = 0.01  # of a correction, at each plain step: what was too dear is tried again some time


class Governor:
    """Times the steps of a model's sequences, which share one step, and says whether the next one should draft.

    Args:
        trial: drafting steps before the first verdict; a later trial, after a rest, takes half as many.
        rest: plain steps after a lost trial; doubled by each loss up to `most_rest`, and reset by a win or a new text. More
            where that does not make up for the loss.
        refresh: a plain step is taken after so many drafting ones, so that its cost stays known.
        clock: seconds.
    """

    def __init__(
        self,
        trial: int = 6,
        rest: int = 24,
        most_rest: int = 128,
        refresh: int = 32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trial, self._first_rest, self._most_rest, self._refresh = trial, rest, most_rest, refresh
        self._clock = clock
        self.cost: StepCost | None = None
        self._measured: StepCost | None = None
        self._corrections: list[
            float | None
        ] = []  # factors of the measured seconds, None where no step was seen
        self._began: float | None = None  # the step that is under way
        self._ended = 0.0
        self._drafted, self._tokens, self._rows, self._counts, self._sequences = False, 0, 0, True, 0
        self._plain: deque[float] = deque(maxlen=_PLAIN_STEPS)
        self._draft_seconds = self._draft_tokens = 0.0
        self._recent: deque[float] = deque(maxlen=_PLAIN_STEPS)  # drafting steps
        self._debt = 0.0  # seconds that drafts have lost against plain steps and rests have not made up for
        # A few plain steps come first, the first of them to warm up.
        self._rest, self._resting, self._trying, self._tried, self._since_plain = rest, 4, trial, 0, 0

    def calibrate(self, measured: StepCost) -> StepCost:
        """The measured cost of a step as steps have corrected it so far."""
        if measured != self._measured:
            self._measured = self.cost = measured
            self._corrections = [None] * len(measured.rows)
        assert self.cost is not None, "set above"
        return self.cost

    def begins(self) -> None:
        """A text begins: it may repeat itself where the last one did not."""
        self._rest = self._first_rest
        self._resting = min(self._resting, max(self._first_rest, self._owed()))

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
            self._resting -= 1
            self._since_plain = 0
            self._debt = max(0.0, self._debt - _ALLOWANCE * seconds)
            return
        if self._rows > self._sequences:
            self._correct(self._rows, seconds)
        self._since_plain += 1
        if self._since_plain >= self._refresh:
            self._resting = 1
        keep = 1 - 1 / (2 * self._trial)
        self._draft_seconds = keep * self._draft_seconds + seconds
        self._draft_tokens = keep * self._draft_tokens + share
        self._trying -= 1
        self._tried += 1
        if not self._plain:
            return
        plain = statistics.median(self._plain)
        self._recent.append(seconds)
        # A median, as one step that the machine kept waiting is no loss of the drafts'.
        self._debt = max(0.0, self._debt + statistics.median(self._recent) - share * plain)
        plainly = self._draft_tokens * plain  # the seconds of as many plain steps
        clear_loss = any(
            self._tried >= steps and plainly < share_left * self._draft_seconds
            for steps, share_left in _ENDINGS
        )
        if self._trying > 0 and not clear_loss:
            return
        if plainly >= self._draft_seconds:
            self._rest = self._first_rest
            return
        self._resting = max(self._rest, self._owed())
        self._rest = min(2 * self._rest, self._most_rest)
        self._trying = max(1, self._trial // 2)
        self._tried = 0
        self._draft_seconds = self._draft_tokens = 0.0

    def _owed(self) -> int:
        """Plain steps that make up for what drafts have lost."""
        if not self._debt:
            return 0
        return math.ceil(self._debt / (_ALLOWANCE * statistics.median(self._plain)))

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

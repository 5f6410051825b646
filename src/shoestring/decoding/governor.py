"""Whether drafting pays, by the clock: tokens per second of steps with drafts against steps without.

What a step's rows cost is measured once, and what guesses are worth is learnt; but a busy machine, a long context or a
text that repeats nothing can make drafting lose all the same. So steps are timed as they come: where drafts lose, they rest
for a while, twice as long each time, and are then tried again.
"""

import time
from collections.abc import Callable

__all__ = ["Governor"]


class Governor:
    """Times the steps of a request's sequences, which share one step, and says whether the next one should draft.

    Args:
        trial: drafting steps before the first verdict; a later trial, after a rest, takes half as many.
        rest: plain steps after a lost trial; doubled by each loss up to `most_rest`, and reset by a win.
        refresh: a plain step is taken after so many drafting ones, so that its cost stays known.
        clock: seconds.
    """

    def __init__(
        self,
        trial: int = 8,
        rest: int = 16,
        most_rest: int = 128,
        refresh: int = 64,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trial, self._first_rest, self._most_rest, self._refresh = trial, rest, most_rest, refresh
        self._clock = clock
        self._rest = rest
        self._began: float | None = None  # the step that is under way
        self._ended = 0.0
        self._drafted, self._tokens, self._counts = False, 0, True
        self._sequences = 0
        self._plain_seconds: float | None = None  # of a plain step, and of a drafting one and what it emitted
        self._draft_seconds = self._draft_tokens = 0.0
        # Two plain steps come first: one to warm up, one to be timed.
        self._resting, self._trying, self._since_plain = 2, trial, 0

    def drafts(self) -> bool:
        """Whether the step that begins now should draft. Called by every sequence that takes part in it."""
        if self._began is None or self._tokens:
            self._finish()
            self._began, self._tokens, self._counts, self._sequences = self._clock(), 0, True, 0
            self._drafted = self._resting <= 0
        self._sequences += 1
        return self._drafted

    def ends(self, tokens: int, counts: bool = True) -> None:
        """The step emitted tokens of one sequence; one that also read a prompt does not count."""
        self._tokens += tokens
        self._ended = self._clock()
        self._counts = self._counts and counts

    def _finish(self) -> None:
        """Judge the step that is over."""
        if self._began is None or not self._counts:
            return
        seconds, share = self._ended - self._began, self._tokens / max(1, self._sequences)
        if not self._drafted:
            known = self._plain_seconds
            self._plain_seconds = seconds if known is None else known + (seconds - known) / 4
            self._resting -= 1
            self._since_plain = 0
            return
        self._since_plain += 1
        if self._since_plain >= self._refresh:
            self._resting = 1
        keep = 1 - 1 / (2 * self._trial)
        self._draft_seconds = keep * self._draft_seconds + seconds
        self._draft_tokens = keep * self._draft_tokens + share
        self._trying -= 1
        if self._trying > 0 or self._plain_seconds is None:
            return
        if self._draft_tokens * self._plain_seconds >= self._draft_seconds:
            self._rest = self._first_rest
            return
        self._resting, self._rest = self._rest, min(2 * self._rest, self._most_rest)
        self._trying = max(1, self._trial // 2)
        self._draft_seconds = self._draft_tokens = 0.0

"""Whether drafting pays, by the clock: steps are timed as they come, and drafts that lose to plain steps rest.

What a step's rows cost is measured once, perhaps while the machine was busy, and without the drafter's own work. So the
steps that decoding takes correct that measurement, row count by row count, and the drafter plans with the corrected one.
And where drafting still gives fewer tokens per second than plain steps do (a text that repeats nothing, a long context),
drafts rest. How many tokens a step gives is mostly chance, so that a few steps say little: drafts go on until they have
lost as much time as a few plain steps take, and then rest until that is a small share of the time. The next text is another
text: where drafts have saved more so far than they lost, they are tried anew at once.
"""

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from shoestring.decoding.tune import StepCost

__all__ = ["Governor"]

# Steps of a kind whose median says what one takes, or what is too much: a step that the machine kept waiting says nothing.
_REMEMBERED = 7
_OUTLIER = 3  # times the median of drafting steps: more says something of the machine
_WEIGHT = 0.25  # of a new time against what was known of steps of about as many rows
_MOST_PATIENCE = 4  # how many times longer than that drafts rest at most, where they lose again and again
_NOTICED = 0.02  # of a step's seconds: a smaller correction is not worth planning anew for
_WATCHED = 8  # of so many plain steps one is timed, where drafts rest for long: the clock costs time itself
_CORRECTED_AFTER = 16  # plain steps, where drafts rest for long: planning does not need them sooner
# Tokens that a drafter is believed from the first, and steps that count against it.
_TRUSTED, _LATELY = 24.0, 64
# Texts that draft well end sooner and leave the others to a step that costs nearly as much: of what drafts give a batch on
# average, each further sequence takes so much away.
_LAGGING = 0.015
_MANY = 2  # the account of three and four sequences, and those of more: texts that come and go do not end their rest
_FEW = 4  # sequences: drafts of more seldom pay, so that each trial has to be made up for by more plain steps
_FADING = 0.01  # of a correction, at each plain step: what was too dear is tried again some time


@dataclass
class _Times:
    """What plain and drafting steps of so many sequences took last."""

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    drafting: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))


@dataclass(slots=True)
class _Over:
    """A step that is over, and not judged yet."""

    seconds: float
    drafted: bool
    sequences: int
    told: int
    tokens: float
    rows: int
    expected: float


@dataclass
class _Account:
    """What drafts of about so many sequences have won."""

    resting: int
    """Plain steps that are still to come before drafts are tried."""
    saved: float
    """What drafts have won in all, in plain steps; the first losses are free, and plain steps make up for others."""
    balance: float = 0.0
    """What drafts have won since they rested last."""
    patience: int = 1
    since_plain: int = 0
    given: float = _TRUSTED
    """Tokens that drafting steps gave lately, after some that gave just what was expected."""
    expected: float = _TRUSTED

    def promise(self, tokens: float, expected: float) -> float:
        """How many tokens steps give for each that is expected, this one included."""
        self.given += tokens - self.given / _LATELY
        self.expected += expected - self.expected / _LATELY
        return self.given / self.expected


class Governor:
    """Times the steps of a model's sequences, which share one step, and says whether the next one should draft.

    Accounts are kept for one sequence, two, three or four, five to eight and so on: a step of eight says nothing of a step
    of one, and a batch whose texts end one after another must not try drafts anew each time.

    Args:
        limit: what drafts of one sequence may lose before they rest, in plain steps; of n sequences, whose steps leave
            less to chance, an n-th of it.
        allowance: what they may lose in the long run, of the plain steps' time; where more than four share a step, less.
        credit: what earlier wins may make up for, in plain steps; likewise.
        grace: what they may lose besides, over the first texts; likewise.
        savings: the most that earlier wins count when a text begins; likewise.
        first: plain steps that come first, the first of them to warm up.
        refresh: two plain steps are taken after so many drafting ones, so that their cost stays known.
        clock: seconds.
    """

    def __init__(
        self,
        limit: float = 6.0,
        allowance: float = 0.025,
        credit: float = 12.0,
        grace: float = 18.0,
        savings: float = 100.0,
        first: int = 4,
        refresh: int = 128,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limit, self._allowance, self._credit = limit, allowance, credit
        self._grace, self._savings = grace, savings
        self._first, self._refresh = first, refresh
        self._clock = clock
        self._measured: StepCost | None = None
        self._cost: StepCost | None = None
        self._stale = False
        self._drafted_before = False
        self._uncorrected = 0
        """Plain steps that have not corrected the cost yet."""
        self._unwatched, self._passed, self._watches = 0, 0, True
        """Plain steps that are not timed: to come, and since the last one that was; whether this one is."""
        # Factors of the measured seconds, None where no step was seen.
        self._corrections: list[float | None] = []
        # By measured row count, the nearest one that has a correction.
        self._nearest: list[int] = []
        self._began: float | None = None  # the step that is under way
        self._drafted, self._sequences = False, 1
        self._over: _Over | None = None
        self._accounts: dict[int, _Account] = {}
        self._times: dict[int, _Times] = {}

    def calibrate(self, measured: StepCost) -> StepCost:
        """The measured cost of a step as steps have corrected it so far."""
        if measured is not self._measured and measured != self._measured:
            self._measured = self._cost = measured
            self._corrections = [None] * len(measured.rows)
            self._stale = False
        assert self._cost is not None, "set above"
        if self._stale:
            self._stale = False
            seconds = [
                base * (self._corrections[near] or 1.0)
                for base, near in zip(measured.seconds, self._nearest, strict=True)
            ]
            old = self._cost.seconds
            if any(abs(new - then) > _NOTICED * then for new, then in zip(seconds, old, strict=True)):
                self._cost = StepCost(measured.rows, tuple(seconds), measured.stairs)
        return self._cost

    def begins(self) -> None:
        """A text begins: it may repeat itself where the last one did not. Of many texts one more says little."""
        self.judge()
        self._began = None  # what passed since the last step is no step's time
        self._unwatched = 0
        for about, account in self._accounts.items():
            if about < _MANY:
                account.patience = 1
                account.resting = min(account.resting, max(1, math.ceil(-account.saved / self._allowance)))

    def drafts(self, sequences: int = 1) -> bool:
        """Whether the step that begins now, of so many sequences, should draft."""
        if self._unwatched and sequences == self._sequences:
            self._unwatched, self._passed = self._unwatched - 1, self._passed + 1
            self._watches = False
            return False
        if self._passed:
            self._rest(self._account(self._sequences), self._passed)
        self._watches, self._unwatched, self._passed = True, 0, 0
        self._began, self._sequences = self._clock(), sequences
        times = self._times.get(sequences)
        if times is None:
            times = self._times[sequences] = _Times()
        account = self._account(sequences)
        self._drafted = account.resting <= 0 and bool(times.plain)
        if account.resting > _WATCHED:
            self._unwatched = _WATCHED - 1
        return self._drafted

    def ends(
        self,
        tokens: int,
        rows: int | None = None,
        expected: float | None = None,
        told: int = 1,
        counts: bool = True,
        later: bool = False,
    ) -> None:
        """The step that began last is over.

        Args:
            tokens: that were emitted by the `told` sequences which go on.
            rows: that these took; None: one each.
            expected: the tokens that their drafters foresaw, where they have an idea.
            told: how many sequences they are.
            counts: False where others' steps do not compare: it also read a prompt, or something was compiled for it.
            later: it is judged when the caller says so, who has time while the next one runs.
        """
        if not self._watches:
            return
        self.judge()
        if self._began is not None and told and counts:
            self._over = _Over(
                self._clock() - self._began, self._drafted, self._sequences, told, tokens,
                told if rows is None else rows, tokens if expected is None else expected,
            )  # fmt: skip
        if not later:
            self.judge()

    def _account(self, sequences: int) -> _Account:
        """That of about as many sequences; one plain step begins it, and more where nothing has run yet."""
        about = (sequences - 1).bit_length()
        account = self._accounts.get(about)
        if account is None:
            first = 1 if self._accounts else self._first
            account = self._accounts[about] = _Account(first, self._grace / sequences)
        return account

    def judge(self) -> None:
        """Judge the last step that is over, if that has not been done; what steps cost is known anew then."""
        over, self._over = self._over, None
        if over is None:
            return
        self._judge(over)
        if self._stale and self._measured is not None:
            self.calibrate(self._measured).table(0, over.sequences)  # which planning asks for

    def _judge(self, over: _Over) -> None:
        seconds, account = over.seconds, self._account(over.sequences)
        times = self._times[over.sequences]
        if not over.drafted:
            # The first one after drafts switches graphs and gives out their tokens: it is no plain step's time.
            if not self._drafted_before or not times.plain:
                times.plain.append(seconds)
            self._drafted_before = False
            account.since_plain = 0
            self._rest(account, 1)
            if account.resting <= 0 or self._uncorrected >= _CORRECTED_AFTER:
                self._correct(over, _median(times.plain))
                self._uncorrected = 0
            return
        self._drafted_before = True
        if over.rows > over.told:
            self._correct(over, seconds)
        account.since_plain += 1
        if account.since_plain >= self._refresh:
            account.resting = 2
        plain = _median(times.plain) if times.plain else 0.0
        if plain <= 0:
            return
        times.drafting.append(seconds)
        # Drafts differ in rows, so that their median would hide what the wide ones take.
        took = min(seconds, _OUTLIER * _median(times.drafting))
        share = over.expected / over.told * account.promise(over.tokens, over.expected)
        won = share / (1 + _LAGGING * (over.sequences - 1)) - took / plain
        limit, credit = self._limit / over.sequences, self._credit / over.sequences
        account.balance = min(credit, account.balance + won)
        account.saved = min(self._savings / over.sequences, account.saved + won)
        if account.balance >= credit / 2:
            account.patience = 1
        if account.balance < -limit:
            allowance = self._allowance * min(1.0, _FEW / over.sequences)
            account.resting = account.patience * math.ceil(-account.balance / allowance)
            account.patience = min(2 * account.patience, _MOST_PATIENCE)
            account.balance = 0.0

    def _rest(self, account: _Account, steps: int) -> None:
        """So many plain steps have been taken."""
        account.resting -= steps
        self._uncorrected += steps
        if account.saved < 0:
            account.saved = min(0.0, account.saved + steps * self._allowance)

    def _correct(self, over: _Over, seconds: float) -> None:
        """Let the time of a step of so many rows correct the measured cost."""
        measured, rows = self._measured, over.rows
        if measured is None:
            return
        if measured.stairs:
            nearest = min(bisect_left(measured.rows, rows), len(measured.rows) - 1)
        else:
            nearest = _nearest(measured.rows, rows)
        factor, known = seconds / measured.of(rows), self._corrections[nearest]
        if not over.drafted:
            # What a plain step takes is a median already; other corrections fade towards its own.
            faded = 1 - (1 - _FADING) ** self._uncorrected
            self._corrections = [
                None if other is None else other + faded * (factor - other) for other in self._corrections
            ]
            known = None
        self._corrections[nearest] = factor if known is None else known + _WEIGHT * (factor - known)
        if known is None:
            seen = [index for index, other in enumerate(self._corrections) if other is not None]
            self._nearest = [seen[_nearest(seen, index)] for index in range(len(measured.rows))]
        self._stale = True


def _median(times: Collection[float]) -> float:
    """That of a few times, at every step: `statistics` takes its own."""
    ordered, middle = sorted(times), len(times) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _nearest(numbers: Sequence[int], number: int) -> int:
    """The index of the nearest of increasing numbers, of two as near the smaller one."""
    above = bisect_left(numbers, number)
    if above == len(numbers) or (above and number - numbers[above - 1] <= numbers[above] - number):
        return above - 1
    return above

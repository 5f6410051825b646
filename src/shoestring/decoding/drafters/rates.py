"""How often each kind of guess comes true: counted while decoding, from a prior on."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from shoestring.engine.native_part import native_part

__all__ = ["MOST_CERTAIN", "SOURCES", "AcceptanceRates", "Agreement", "Guess", "drafting_part"]

Guess = tuple[str, int, int]
"""A kind of guess: source, length of the context that it matched (PaSS: position), rank among that source's guesses.

Recycled successors of a pair of tokens have length 2, of one token 1, and those known beforehand 0; where a longer
context gave some too, 3 more.
"""

SOURCES = ("ngram", "recycle", "pass", "only pass", "datastore")

MOST_CERTAIN = 0.97
"""The most that a guessed token's chance is, however many sources agree."""

# By length, from 0. "only pass": a token that PaSS alone foresaw, whether or not the tokens before it were drafted.
_FIRST = MappingProxyType(
    {
        "ngram": (0.2, 0.2, 0.5, 0.6, 0.65, 0.7, 0.8),
        "recycle": (0.12, 0.33, 0.6, 0.02, 0.1),
        "pass": (0.3, 0.3, 0.2, 0.15, 0.1),
        "only pass": (0.15, 0.15, 0.05, 0.02, 0.01),
        "datastore": (0.1, 0.1, 0.18, 0.29, 0.38, 0.42, 0.52),
    }
)


def drafting_part() -> Any:
    """The native part, where it drafts as the plain twin of this version does."""
    return native_part("Guesses", "Datastore", "Drafted", "draft_together")


class AcceptanceRates:
    """How often each kind of guess came true, with a prior and slow forgetting.

    Args:
        priors: rates measured before, that go before those written here.
        native: keep the counts where the native guesses can read them; None: where the native part is installed.
    """

    _PRIOR_WEIGHT = 6.0
    _MEMORY = 200.0

    def __init__(self, priors: Mapping[Guess, float] | None = None, native: bool | None = None) -> None:
        self._priors = dict(priors or {})
        self._counts: dict[Guess, tuple[float, float]] = {}
        module = None if native is False else drafting_part()
        self.native: Any = None
        """The native counts; None: they are here."""
        if module is not None:
            first = [list(_FIRST[source]) for source in SOURCES]
            self.native = module.AcceptanceRates(first, self._PRIOR_WEIGHT, self._MEMORY)
            for (source, length, rank), rate in self._priors.items():
                self.native.set_prior(SOURCES.index(source), length, rank, rate)

    def rate(self, guess: Guess) -> float:
        """The estimated chance that such a guess is right."""
        if self.native is not None:
            return float(self.native.rate(SOURCES.index(guess[0]), guess[1], guess[2]))
        hits, trials = self._counts.get(guess, (0.0, 0.0))
        prior = self._priors[guess] if guess in self._priors else _prior(guess)
        return (hits + self._PRIOR_WEIGHT * prior) / (trials + self._PRIOR_WEIGHT)

    def observe(self, guess: Guess, hit: bool) -> None:
        """Count a guess that was put to the test."""
        if self.native is not None:
            self.native.observe(SOURCES.index(guess[0]), guess[1], guess[2], hit)
            return
        hits, trials = self._counts.get(guess, (0.0, 0.0))
        if trials >= self._MEMORY:
            keep = 1 - 1 / self._MEMORY
            hits, trials = hits * keep, trials * keep
        self._counts[guess] = (hits + hit, trials + 1)


class Agreement:
    """How much likelier than its best guess says a token is where other sources guess it too; less likely where none does.

    Counted over one text; the native guesses count by themselves.
    """

    _PRIOR, _MEMORY, _MOST_OTHERS = 5.0, 300.0, 2

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], tuple[float, float]] = {}

    def corrected(self, chance: float, source: str, others: int) -> float:
        """The chance of a token whose best guess is a source's, where so many others guess it too."""
        hits, expected = self._of(source, others)
        return min(MOST_CERTAIN, chance * (hits / expected))

    def observe(self, chance: float, source: str, others: int, hit: bool) -> None:
        """Count a token that was put to the test."""
        hits, expected = self._of(source, others)
        if expected >= self._MEMORY:
            hits, expected = hits * 0.5, expected * 0.5
        self._counts[source, min(others, self._MOST_OTHERS)] = hits + hit, expected + chance

    def _of(self, source: str, others: int) -> tuple[float, float]:
        return self._counts.get((source, min(others, self._MOST_OTHERS)), (self._PRIOR, self._PRIOR))


def _prior(guess: Guess) -> float:
    """A guess's rate before any is seen, rounded from `benchmarks/acceptance_rates.py`."""
    source, length, rank = guess
    first = _FIRST[source]
    return first[min(length, len(first) - 1)] * (0.4 / rank if rank else 1.0)

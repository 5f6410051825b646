"""How often each kind of guess comes true: counted while decoding, from a prior on."""

from collections.abc import Mapping

__all__ = ["AcceptanceRates", "Guess"]

Guess = tuple[str, int, int]
"""A kind of guess: source, length of the context that it matched (PaSS: position), rank among that source's guesses."""


class AcceptanceRates:
    """How often each kind of guess came true, with a prior and slow forgetting.

    Args:
        priors: rates measured before, that go before those written here.
    """

    _PRIOR_WEIGHT = 6.0
    _MEMORY = 200.0

    def __init__(self, priors: Mapping[Guess, float] | None = None) -> None:
        self._priors = dict(priors or {})
        self._counts: dict[Guess, tuple[float, float]] = {}

    def rate(self, guess: Guess) -> float:
        """The estimated chance that such a guess is right."""
        hits, trials = self._counts.get(guess, (0.0, 0.0))
        prior = self._priors[guess] if guess in self._priors else _prior(guess)
        return (hits + self._PRIOR_WEIGHT * prior) / (trials + self._PRIOR_WEIGHT)

    def observe(self, guess: Guess, hit: bool) -> None:
        """Count a guess that was put to the test."""
        hits, trials = self._counts.get(guess, (0.0, 0.0))
        if trials >= self._MEMORY:
            keep = 1 - 1 / self._MEMORY
            hits, trials = hits * keep, trials * keep
        self._counts[guess] = (hits + hit, trials + 1)


# "only pass": a token that PaSS alone foresaw, at a position, whether or not the tokens before it were drafted.
_FIRST = {
    "ngram": (0.2, 0.5, 0.6, 0.65, 0.7, 0.8),
    "recycle": (0.3, 0.55),
    "pass": (0.3, 0.2, 0.15, 0.1),
    "only pass": (0.15, 0.05, 0.02, 0.01),
}


def _prior(guess: Guess) -> float:
    """A guess's rate before any is seen, rounded from `benchmarks/acceptance_rates.py`."""
    source, length, rank = guess
    first = _FIRST[source]
    return first[min(length, len(first)) - 1] * (0.4 / rank if rank else 1.0)

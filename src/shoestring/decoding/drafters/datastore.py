"""A datastore (REST, arXiv 2311.08252): what followed the last few tokens in texts that the model wrote before."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from shoestring.decoding.drafters.rates import drafting_part

__all__ = ["Datastore"]

_LEAST_LENGTH, _LONGEST, _MOST_TOKENS = 2, 6, 8


class Datastore:
    """Texts that sequences share, looked up by suffix; the plain twin of the native one.

    Args:
        tokens: the texts one behind another, int32 [N].
        longest: tokens of a suffix that is looked for.
    """

    def __init__(self, tokens: np.ndarray, longest: int = _LONGEST) -> None:
        self._array = np.ascontiguousarray(tokens, np.int32)
        self._longest = longest

    def __len__(self) -> int:
        return len(self._array)

    @cached_property
    def native(self) -> Any:
        """The same for native guesses."""
        return drafting_part().Datastore(self._array, self._longest)

    @cached_property
    def _tokens(self) -> list[int]:
        return self._array.tolist()

    @cached_property
    def _order(self) -> list[tuple[tuple[int, ...], int]]:
        """Positions by the tokens before them, the nearest first."""
        tokens, longest = self._tokens, self._longest
        return sorted(
            (tuple(tokens[max(0, position - longest) : position][::-1]), position)
            for position in range(_LEAST_LENGTH, len(tokens))
        )

    def after(self, tail: Sequence[int]) -> tuple[int, list[int]]:
        """The length of the longest suffix of `tail` that is found, and what follows it, most frequent first.

        Of many places that follow it a few are looked at, evenly spread. (0, []): not even two tokens are found.
        """
        tail, order = [*tail][-self._longest :], self._order
        found = range(0)
        length = 0
        for longer in range(_LEAST_LENGTH, len(tail) + 1):
            suffix = tuple(tail[-longer:][::-1])
            low = bisect_left(order, suffix, key=lambda entry: entry[0][: len(suffix)])
            high = bisect_right(order, suffix, lo=low, key=lambda entry: entry[0][: len(suffix)])
            if low == high:
                break
            found, length = range(low, high), longer
        looked_at = min(len(found), _MOST_TOKENS)
        places = (found[index * len(found) // looked_at] for index in range(looked_at))
        counts = Counter(self._tokens[order[place][1]] for place in places)
        return length, [token for token, _ in counts.most_common()]

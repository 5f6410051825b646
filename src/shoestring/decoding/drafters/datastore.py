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
    def _order(self) -> np.ndarray:
        """Positions by the tokens before them, the nearest first: int64 [N]."""
        positions = np.arange(_LEAST_LENGTH, len(self._array))
        # The last key is the first one to go by; equals stay in the order of their positions.
        order = np.lexsort([self._before(positions, back) for back in range(self._longest, 0, -1)])
        return positions[order]

    def _before(self, positions: np.ndarray, back: int) -> np.ndarray:
        """The tokens that stand so far before positions; -1 before the first one."""
        return np.where(positions >= back, self._array[np.maximum(positions - back, 0)], -1)

    def after(self, tail: Sequence[int]) -> tuple[int, list[int]]:
        """The length of the longest suffix of `tail` that is found, and what follows it, most frequent first.

        Of many places that follow it a few are looked at, evenly spread. (0, []): not even two tokens are found.
        """
        array, order = self._array, self._order
        found, length = range(len(order)), 0
        for longer in range(1, min(len(tail), self._longest) + 1):
            token = tail[-longer]

            def before(place: int, back: int = longer) -> int:
                position = order.item(place)
                return array.item(position - back) if position >= back else -1

            low = bisect_left(range(len(order)), token, found.start, found.stop, key=before)
            high = bisect_right(range(len(order)), token, low, found.stop, key=before)
            if low == high:
                break
            found, length = range(low, high), longer
        if length < _LEAST_LENGTH:
            return 0, []
        looked_at = min(len(found), _MOST_TOKENS)
        places = (found[index * len(found) // looked_at] for index in range(looked_at))
        counts = Counter(array.item(order.item(place)) for place in places)
        return length, [token for token, _ in counts.most_common()]

"""Token recycling (arXiv 2408.08696): what the model thought likely after a token before is tried after it again."""

from collections.abc import Sequence

__all__ = ["SuccessorTable"]


class SuccessorTable:
    """The model's last seen top-k successors of a token, and of a token behind another one."""

    def __init__(self, entries: int = 200_000) -> None:
        self._entries = entries
        self._single: dict[int, Sequence[int]] = {}
        self._pair: dict[tuple[int, int], Sequence[int]] = {}

    def update(self, before: int, token: int, successors: Sequence[int]) -> None:
        """Remember what followed `token` behind `before`; the oldest pairs make room."""
        self._single[token] = successors
        pair = (before, token)
        self._pair.pop(pair, None)
        self._pair[pair] = successors
        if len(self._pair) > self._entries:
            del self._pair[next(iter(self._pair))]

    def after_pair(self, before: int, token: int) -> Sequence[int]:
        """Likely successors of `token` behind `before`, best first."""
        return self._pair.get((before, token), ())

    def after(self, token: int) -> Sequence[int]:
        """Likely successors of `token`, best first."""
        return self._single.get(token, ())

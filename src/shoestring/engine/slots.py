"""Which sequences are cached where: open and released slots, and whose prefix a new prompt can reuse.

The policy is apart from the storage, so that every runner keeps its sequences alike.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["CachedSequence", "Slots"]

_RETAINED_SLOTS = 4
_SHORTEST_SHARED_PREFIX = 16


class CachedSequence(Protocol):
    """A sequence's storage, as far as the policy looks into it."""

    tokens: list[int]
    last_used: int


S = TypeVar("S", bound=CachedSequence)


class Slots(Generic[S]):
    """Open slots and a few released sequences whose storage is kept for a prompt that continues them.

    Args:
        create: makes an empty storage.
        copy_prefix: `(target, source, length)`: the first `length` tokens' keys and values become the source's.
    """

    def __init__(self, create: Callable[[], S], copy_prefix: Callable[[S, S, int], None]) -> None:
        self._create, self._copy_prefix = create, copy_prefix
        self.live: dict[int, S] = {}
        self._released: list[S] = []
        self._clock = 0

    def __getitem__(self, slot: int) -> S:
        return self.live[slot]

    def __iter__(self) -> Iterator[S]:
        yield from self.live.values()
        yield from self._released

    def open(self, slot: int, prompt: Sequence[int]) -> int:
        """Give `slot` storage and return how many of `prompt`'s first tokens are already cached in it.

        A released sequence that shares the longest prefix is taken over; a live one is copied from.
        At least the prompt's last token is left to run.
        """
        if slot in self.live:
            raise ValueError(f"slot {slot} is open already")
        self._clock += 1
        most = len(prompt) - 1
        shared = [(min(_common_prefix(s.tokens, prompt), most), s) for s in self._released]
        length, storage = max(shared, key=lambda pair: pair[0], default=(0, None))
        if storage is None or length < _SHORTEST_SHARED_PREFIX:
            length = 0
            storage = min(self._released, key=lambda s: s.last_used) if self._is_full() else self._create()
        live = [(min(_common_prefix(s.tokens, prompt), most), s) for s in self.live.values()]
        longest, source = max(live, key=lambda pair: pair[0], default=(0, storage))
        if storage in self._released:
            self._released.remove(storage)
        if longest >= _SHORTEST_SHARED_PREFIX and longest > length:
            self._copy_prefix(storage, source, longest)
            length, storage.tokens = longest, source.tokens[:longest]
        del storage.tokens[length:]
        storage.last_used = self._clock
        self.live[slot] = storage
        return length

    def release(self, slot: int) -> None:
        """Close `slot`; its storage is retained for a later prompt that continues it."""
        self._released.append(self.live.pop(slot))
        while len(self._released) > _RETAINED_SLOTS:
            self._released.remove(min(self._released, key=lambda s: s.last_used))

    def clear(self) -> None:
        """Drop all retained sequences."""
        self._released.clear()

    def _is_full(self) -> bool:
        return len(self._released) >= _RETAINED_SLOTS


def _common_prefix(cached: Sequence[int], prompt: Sequence[int]) -> int:
    count = 0
    for a, b in zip(cached, prompt, strict=False):
        if a != b:
            break
        count += 1
    return count

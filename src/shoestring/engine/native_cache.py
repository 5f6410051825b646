"""Keys and values of all sequences for the native step: the slots' policy over storage that C++ owns."""

from collections.abc import Mapping, Sequence
from typing import Any

from shoestring.engine.slots import Slots

__all__ = ["NativeCache"]

_FIRST_CAPACITY = 256


class _Sequence:
    """One sequence: its tokens and its native storage."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.tokens: list[int] = []
        self.last_used = 0


class NativeCache:
    """The native step's key-value cache; the same slots, prefixes and growth as `KVCache`.

    Args:
        model: the native model, which makes storage of its own shape.
        limit: the most tokens that a sequence may hold, a step's own rows included.
    """

    def __init__(self, model: Any, limit: int | None = None) -> None:
        self._limit = limit
        self._slots = Slots(lambda: _Sequence(model.storage()), self._copy_prefix)

    @property
    def live(self) -> Mapping[int, Any]:
        """The open slots."""
        return self._slots.live

    def open(self, slot: int, prompt: Sequence[int]) -> int:
        """Give `slot` storage and return how many of `prompt`'s first tokens are already cached in it."""
        return self._slots.open(slot, prompt)

    def release(self, slot: int) -> None:
        """Close `slot`; its storage is retained for a later prompt that continues it."""
        self._slots.release(slot)

    def storage(self, slot: int) -> Any:
        """The slot's native storage."""
        return self._slots[slot].storage

    def tokens(self, slot: int) -> list[int]:
        """The tokens whose keys and values are cached, oldest first (not a copy)."""
        return self._slots[slot].tokens

    def length(self, slot: int) -> int:
        """How many tokens are cached."""
        return len(self._slots[slot].tokens)

    def commit(self, slot: int, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Keep these rows of the last step, in this order, as the next cached tokens; drop the rest."""
        sequence = self._slots[slot]
        if list(rows) != list(range(len(rows))):
            sequence.storage.gather(len(sequence.tokens), list(rows))
        sequence.tokens.extend(tokens)

    def rewind(self, slot: int, length: int) -> None:
        """Drop all tokens beyond the first `length`."""
        del self._slots[slot].tokens[length:]

    def reserve(self, slot: int, rows: int) -> None:
        """Make room for a step of `rows` rows."""
        sequence = self._slots[slot]
        self._grow(sequence, len(sequence.tokens) + rows, keep=len(sequence.tokens))

    @property
    def nbytes(self) -> int:
        """Bytes held by live and retained sequences."""
        return sum(sequence.storage.nbytes for sequence in self._slots)

    def clear(self) -> None:
        """Drop all retained sequences."""
        self._slots.clear()

    def _copy_prefix(self, target: _Sequence, source: _Sequence, length: int) -> None:
        self._grow(target, length, keep=0)
        target.storage.copy_prefix(source.storage, length)

    def _grow(self, sequence: _Sequence, needed: int, keep: int) -> None:
        capacity: int = sequence.storage.capacity
        if needed <= capacity:
            return
        capacity = max(_FIRST_CAPACITY, capacity)
        while capacity < needed:
            capacity *= 2
        if self._limit is not None:
            capacity = max(min(capacity, self._limit), needed)
        sequence.storage.reserve(capacity, keep)

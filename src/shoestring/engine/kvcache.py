"""Keys and values of all layers for all sequences, behind the face of transformers' `past_key_values`.

A slot's storage is one tensor per distinct plane shape, `[planes, K, capacity, D]`, where a plane is one layer's
keys or values: layers may differ in head dimension, keys and values in width, and a commit is one gather for all.
Storage is contiguous per slot, so attention reads plain views; it grows by doubling up to the context limit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoestring.engine.attention import StepLayout, current_step
from shoestring.engine.slots import Slots

__all__ = ["KVCache", "LayerShapeRecorder", "PlaneShape"]

_FIRST_CAPACITY = 256


@dataclass(frozen=True)
class PlaneShape:
    """One layer's keys or values: `[heads, slots, width]`."""

    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device


class LayerShapeRecorder:
    """A stand-in cache for one forward pass: hands keys and values back and notes their shapes per layer."""

    is_compileable = False

    def __init__(self) -> None:
        self.planes: dict[tuple[int, str], PlaneShape] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Note the layer's shapes; `key` and `value` are `[1, K, T, D]`."""
        for kind, states in (("key", key), ("value", value)):
            self.planes[layer_idx, kind] = PlaneShape(
                states.shape[1], states.shape[3], states.dtype, states.device
            )
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is cached."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Queries begin at position 0."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys are the step's own."""
        return query_length, 0


@dataclass(eq=False)
class _Storage:
    """The cache of one sequence: its tokens so far and one tensor per plane shape."""

    arenas: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    last_used: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        return self.arenas[0].shape[2] if self.arenas else 0


class KVCache:
    """The engine's key-value cache; pass it to a model as `past_key_values` inside an active step.

    Args:
        planes: the shape of each (layer, "key" | "value"), as `LayerShapeRecorder` found them.
        limit: the most tokens that a sequence may hold, a step's own rows included.
    """

    is_compileable = False

    def __init__(self, planes: Mapping[tuple[int, str], PlaneShape], limit: int | None = None) -> None:
        shapes = list(dict.fromkeys(planes.values()))
        counts = [0] * len(shapes)
        self._plane: dict[tuple[int, str], tuple[int, int]] = {}
        for name, shape in planes.items():
            group = shapes.index(shape)
            self._plane[name] = (group, counts[group])
            counts[group] += 1
        self._groups = list(zip(shapes, counts, strict=True))
        self._limit = limit
        self._slots = Slots(_Storage, self._copy_prefix)

    # Slots -----------------------------------------------------------------------------------------------

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

    def tokens(self, slot: int) -> list[int]:
        """The tokens whose keys and values are cached, oldest first (not a copy)."""
        return self._slots[slot].tokens

    def length(self, slot: int) -> int:
        """How many tokens are cached."""
        return self._slots[slot].length

    def commit(self, slot: int, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Keep these rows of the last step, in this order, as the next cached tokens; drop the rest."""
        storage = self._slots[slot]
        n, count = storage.length, len(rows)
        if list(rows) != list(range(count)):
            for arena in storage.arenas:
                index = torch.tensor(rows, device=arena.device) + n
                arena[:, :, n : n + count] = arena.index_select(2, index)
        storage.tokens.extend(tokens)

    def rewind(self, slot: int, length: int) -> None:
        """Drop all tokens beyond the first `length`."""
        del self._slots[slot].tokens[length:]

    @property
    def nbytes(self) -> int:
        """Bytes held by live and retained sequences."""
        return sum(arena.nbytes for storage in self._slots for arena in storage.arenas)

    def clear(self) -> None:
        """Drop all retained sequences."""
        self._slots.clear()

    def reserve(self, slot: int, rows: int) -> None:
        """Make room for a step of `rows` rows."""
        storage = self._slots[slot]
        self._grow(storage, storage.length + rows, keep=storage.length)

    def _copy_prefix(self, target: _Storage, source: _Storage, length: int) -> None:
        self._grow(target, length, keep=0)
        for arena, origin in zip(target.arenas, source.arenas, strict=True):
            arena[:, :, :length] = origin[:, :, :length]

    def _grow(self, storage: _Storage, needed: int, keep: int) -> None:
        if needed <= storage.capacity:
            return
        capacity = max(_FIRST_CAPACITY, storage.capacity)
        while capacity < needed:
            capacity *= 2
        if self._limit is not None:
            capacity = max(min(capacity, self._limit), needed)
        arenas = []
        for group, (shape, count) in enumerate(self._groups):
            arena = torch.zeros(
                count, shape.heads, capacity, shape.width, dtype=shape.dtype, device=shape.device
            )
            if keep:
                arena[:, :, :keep] = storage.arenas[group][:, :, :keep]
            arenas.append(arena)
        storage.arenas = arenas

    # transformers' cache face ----------------------------------------------------------------------------

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the step's rows `[1, K, T, D]`; return each slot's cached and new keys, one slot behind another."""
        step = current_step()
        if step is None:
            raise RuntimeError("the cache was used outside a step of its runner")
        return self._write(step, key, layer_idx, "key"), self._write(step, value, layer_idx, "value")

    def _write(self, step: StepLayout, states: Tensor, layer_idx: int, kind: str) -> Tensor:
        group, plane = self._plane[layer_idx, kind]
        views = []
        for segment in step.segments:
            arena = self._slots[segment.slot].arenas[group][plane]
            arena[:, segment.cached : segment.cached + segment.rows] = states[
                0, :, segment.first_row : segment.first_row + segment.rows
            ]
            views.append(arena[None, :, : segment.cached + segment.rows])
        return views[0] if len(views) == 1 else torch.cat(views, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens of the step's first slot (positions are always passed explicitly)."""
        step = current_step()
        return step.segments[0].cached if step else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """All keys of the step: `(cached + new tokens over all slots, 0)`."""
        step = current_step()
        return (step.total_keys if step else query_length), 0

"""Keys and values of all sequences on a GPU: the slots' policy over paged blocks that kernels find by a table of addresses.

A sequence owns whole blocks (64 tokens of all layers). An open slot has a row of the table, which is written when its
blocks change and never by a step, so captured graphs outlive the cache's growth. Commits are lazy: kept rows of a branching
tree are moved at the beginning of the next step, in the same launch sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import eq

import torch
from jaxtyping import Int64
from torch import Tensor

from shoestring.engine.cuda.layout import BLOCK_TOKENS, MAX_TREE_ROWS, Moves
from shoestring.engine.slots import Slots
from shoestring.errors import RequestError

__all__ = ["MAX_SLOTS", "PagedCache"]

MAX_SLOTS = 16
"""Sequences that can be open at once."""


@dataclass(eq=False)
class _Sequence:
    """One sequence: its tokens, its blocks, and its row of the table while it is open."""

    tokens: list[int] = field(default_factory=list)
    last_used: int = 0
    blocks: list[Tensor] = field(default_factory=list)
    table_row: int = -1
    moves: Moves | None = None


class PagedCache:
    """The fused step's key-value cache; the same slots and prefixes as `KVCache`.

    Args:
        block_shape: [L, 2, K, 64, D], as `layout.block_shape` gives it.
        limit: the most tokens that a sequence may hold, a step's own rows included.
    """

    def __init__(
        self, block_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, limit: int
    ) -> None:
        self._shape, self._dtype, self._device = block_shape, dtype, device
        # A tree is stored row behind row, whatever its depth.
        self._max_blocks = -(-(limit + MAX_TREE_ROWS) // BLOCK_TOKENS)
        self.table: Int64[Tensor, "S B"] = torch.zeros(
            MAX_SLOTS, self._max_blocks, dtype=torch.int64, device=device
        )
        self._free_rows = list(range(MAX_SLOTS))[::-1]
        self._slots = Slots(_Sequence, self._copy_prefix)

    @property
    def live(self) -> Mapping[int, object]:
        """The open slots."""
        return self._slots.live

    def open(self, slot: int, prompt: Sequence[int]) -> int:
        """Give `slot` storage and return how many of `prompt`'s first tokens are already cached in it.

        Raises:
            RequestError: as many slots are open as there can be.
        """
        if not self._free_rows:
            raise RequestError(f"{MAX_SLOTS} sequences are open already; release one first")
        reused = self._slots.open(slot, prompt)
        sequence = self._slots[slot]
        sequence.moves = None
        sequence.table_row = self._free_rows.pop()
        self._write_table(sequence, 0)
        return reused

    def release(self, slot: int) -> None:
        """Close `slot`; its storage is retained for a later prompt that continues it. Its moves must have been flushed."""
        sequence = self._slots[slot]
        assert sequence.moves is None, "the runner flushes moves before it releases"
        self._free_rows.append(sequence.table_row)
        sequence.table_row = -1
        self._slots.release(slot)

    def tokens(self, slot: int) -> list[int]:
        """The tokens whose keys and values are cached, oldest first (not a copy)."""
        return self._slots[slot].tokens

    def length(self, slot: int) -> int:
        """How many tokens are cached."""
        return len(self._slots[slot].tokens)

    def table_row(self, slot: int) -> int:
        """The slot's row of the table."""
        return self._slots[slot].table_row

    def blocks(self, slot: int) -> Sequence[Tensor]:
        """The slot's blocks."""
        return self._slots[slot].blocks

    def commit(self, slot: int, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Keep these rows of the last step as the next cached tokens; they are moved when `take_moves` is carried out."""
        sequence = self._slots[slot]
        assert sequence.moves is None, "the last step's moves were not carried out"
        if not all(map(eq, rows, range(len(rows)))):
            sequence.moves = Moves(sequence.table_row, len(sequence.tokens), list(rows))
        sequence.tokens.extend(tokens)

    def take_moves(self) -> list[Moves]:
        """All moves that wait, which the caller carries out now."""
        waiting = []
        for sequence in self._slots.live.values():
            if sequence.moves is not None:
                waiting.append(sequence.moves)
                sequence.moves = None
        return waiting

    @property
    def has_moves(self) -> bool:
        """Whether moves wait."""
        return any(sequence.moves is not None for sequence in self._slots.live.values())

    def rewind(self, slot: int, length: int) -> None:
        """Drop all cached tokens beyond the first `length`. Moves must have been flushed."""
        del self._slots[slot].tokens[length:]

    def reserve(self, slot: int, rows: int) -> None:
        """Make room for a step of `rows` rows."""
        sequence = self._slots[slot]
        self._grow(sequence, len(sequence.tokens) + rows)

    @property
    def nbytes(self) -> int:
        """Bytes held by live and retained sequences."""
        return sum(block.nbytes for sequence in self._slots for block in sequence.blocks)

    def clear(self) -> None:
        """Drop all retained sequences."""
        self._slots.clear()

    def _grow(self, sequence: _Sequence, needed: int) -> None:
        have = len(sequence.blocks)
        wanted = -(-needed // BLOCK_TOKENS)
        if wanted <= have:
            return
        if wanted > self._max_blocks:
            raise RequestError(
                f"the step reaches token {needed} of a cache of {self._max_blocks * BLOCK_TOKENS}"
            )
        for _ in range(wanted - have):
            sequence.blocks.append(torch.zeros(self._shape, dtype=self._dtype, device=self._device))
        self._write_table(sequence, have)

    def _write_table(self, sequence: _Sequence, first: int) -> None:
        """Write the addresses of the blocks from `first` on."""
        if sequence.table_row < 0 or first >= len(sequence.blocks):
            return
        addresses = torch.tensor([block.data_ptr() for block in sequence.blocks[first:]], dtype=torch.int64)
        self.table[sequence.table_row, first : len(sequence.blocks)] = addresses.to(self._device)

    def _copy_prefix(self, target: _Sequence, source: _Sequence, length: int) -> None:
        self._grow(target, length)
        for index in range(-(-length // BLOCK_TOKENS)):
            target.blocks[index].copy_(source.blocks[index])

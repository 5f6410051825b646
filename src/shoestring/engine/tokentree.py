"""A decoding step's input: tokens, each naming its parent row. Depths, positions and the ancestor mask follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import eq, lt
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from shoestring.errors import RequestError

__all__ = ["NO_TOKEN", "NativeTree", "TokenTree"]

T = TypeVar("T")

NO_TOKEN = -1
"""The token id of a row that brings its own embedding; no next token ever equals it."""


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Rows of one step of one sequence.

    Row 0 is the last accepted token; every other row follows the row that `parents` names. A row at depth d
    has position n + d, where n tokens are cached, and attends to the cache, its ancestors and itself.

    Args:
        tokens: a token id per row, `NO_TOKEN` where `embeddings` has the row.
        parents: the parent's row, always an earlier one; -1 for row 0 alone.
        embeddings: row -> input embedding [E] (look-ahead tokens, images).
        allowed: row -> mask [V] of the tokens that may follow the row (grammars).

    Raises:
        RequestError: no rows, a parent that is not an earlier row, or a row without token and embedding.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    embeddings: Mapping[int, Tensor] | None = None
    allowed: Mapping[int, Tensor] | None = None

    def __post_init__(self) -> None:
        tokens, parents = self.tokens, self.parents
        if not tokens or len(tokens) != len(parents) or parents[0] != -1:
            raise RequestError(
                f"a token tree needs rows and one parent per row, the first -1: "
                f"{len(tokens)} tokens, parents {list(parents[:4])}"
            )
        if len(tokens) == 1 and tokens[0] >= 0:  # a plain step
            return
        if min(parents[1:], default=0) < 0 or not all(map(lt, parents, range(len(parents)))):
            row = next(row for row in range(1, len(parents)) if not 0 <= parents[row] < row)
            raise RequestError(f"row {row} names parent {parents[row]}: a parent is an earlier row")
        if min(tokens) < 0:
            own = self.embeddings or ()
            without = [row for row, token in enumerate(tokens) if token < 0 and row not in own]
            if without:
                raise RequestError(f"row {without[0]} has token {tokens[without[0]]} and no embedding")

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> "TokenTree":
        """A tree without branches: each token follows the one before it (prefill, plain decoding)."""
        return cls(tokens, range(-1, len(tokens) - 1))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> list[int]:
        """How many rows are above each row."""
        depths = [0]
        for row in range(1, len(self.tokens)):
            depths.append(depths[self.parents[row]] + 1)
        return depths

    @cached_property
    def is_chain(self) -> bool:
        """Whether every row follows the row before it."""
        return all(map(eq, self.parents, range(-1, len(self.tokens) - 1)))

    @cached_property
    def children(self) -> list[list[int]]:
        """Each row's children, in row order."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for row in range(1, len(self.tokens)):
            children[self.parents[row]].append(row)
        return children

    def tokens_of(self, rows: Sequence[int]) -> list[int]:
        """The rows' tokens."""
        return [self.tokens[row] for row in rows]

    def path(self, row: int) -> list[int]:
        """The rows from row 0 to `row`, both included."""
        rows = [row]
        while (row := self.parents[row]) >= 0:
            rows.append(row)
        return rows[::-1]

    def ancestor_mask(self) -> Bool[Tensor, "T T"]:
        """True where the column's row is the row itself or one of its ancestors."""
        count = len(self.tokens)
        if self.is_chain:
            return torch.ones(count, count, dtype=torch.bool).tril_()
        mask = np.zeros((count, count), dtype=bool)
        for row, parent in enumerate(self.parents):
            if parent >= 0:
                mask[row, :row] = mask[parent, :row]
            mask[row, row] = True
        return torch.from_numpy(mask)


class NativeTree(TokenTree):
    """The last accepted token and a native draft below it, whose rows are right: lists of them are made for those who ask.

    Args:
        draft: the native part's `Drafted`.
        vectors: the embeddings [E] of its look-ahead rows, by their place below a node.
    """

    draft: Any
    vectors: Sequence[Tensor]
    _count: int

    def __init__(self, draft: Any, vectors: Sequence[Tensor]) -> None:
        own = vars(self)
        own["draft"], own["vectors"], own["_count"] = draft, vectors, 1 + len(draft)

    @cached_property
    def tokens(self) -> list[int]:
        """A token id per row."""
        return [self.draft.last, *self.draft.tokens]

    @cached_property
    def parents(self) -> list[int]:
        """Each row's."""
        return [-1, *[parent + 1 for parent in self.draft.parents]]

    @cached_property
    def embeddings(self) -> dict[int, Tensor]:
        """Of look-ahead rows."""
        return dict(zip(self._look_ahead, self.each(self.vectors), strict=True))

    def tokens_of(self, rows: Sequence[int]) -> list[int]:
        """The rows' tokens."""
        found: list[int] = self.draft.tokens_of(rows)
        return found

    def each(self, by_place: Sequence[T]) -> list[T]:
        """What belongs to each look-ahead row, in the rows' order, of what belongs to their places below a node."""
        return [one for _, count in self.draft.chains for one in by_place[:count]]

    @property
    def _look_ahead(self) -> range:
        rows = len(self)
        return range(rows - sum(count for _, count in self.draft.chains), rows)

    def __len__(self) -> int:
        return self._count

"""A draft that guesses have planned (`guesses.py`): its rows stay where they were planned, the native part as a rule.

Of what is planned at every step, few ask for lists: a native draft goes into a native tree (`TokenTree`), which verifies it
and is laid out without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from shoestring.decoding.drafters.protocol import Draft
from shoestring.decoding.drafters.rates import SOURCES
from shoestring.engine.tokentree import NativeTree, TokenTree

__all__ = ["Drafted", "Nodes", "PlainDrafted", "PlannedDraft"]

_OWNERS = [*([source] for source in SOURCES), ["look-ahead"]]
_NO_ROWS: set[int] = set()  # nobody changes it


class Drafted(Protocol):
    """A step's rows below the last token's, as they were planned: nodes, then look-ahead rows.

    A look-ahead row's token is `NO_TOKEN`, and its source `len(SOURCES)`. They stand in the order of `chains`.
    """

    @property
    def tokens(self) -> list[int]:
        """Of each row."""

    @property
    def parents(self) -> list[int]:
        """Each row's: a row before it, or `ROOT`."""

    @property
    def sources(self) -> list[int]:
        """Of each row, an index of `SOURCES`."""

    @property
    def chains(self) -> list[tuple[int, int]]:
        """(node or `ROOT`, look-ahead rows below it)."""

    @property
    def expected(self) -> float:
        """The tokens that the step is expected to give."""

    def chain(self, node: int) -> tuple[int, int]:
        """The first of the look-ahead rows below a node (or `ROOT`), and how many they are."""

    def fits(self, vocabulary: int) -> bool:
        """Whether the nodes' tokens are all of such a vocabulary."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class PlainDrafted:
    """The plain guesses' `Drafted`."""

    tokens: list[int]
    parents: list[int]
    sources: list[int]
    chains: list[tuple[int, int]]
    expected: float

    def chain(self, node: int) -> tuple[int, int]:
        """The first of the look-ahead rows below a node (or `ROOT`), and how many they are."""
        row = len(self)
        for below, count in reversed(self.chains):
            row -= count
            if below == node:
                return row, count
        return row, 0

    def fits(self, vocabulary: int) -> bool:
        """Whether the nodes' tokens are all of such a vocabulary."""
        nodes = len(self) - sum(count for _, count in self.chains)
        return all(0 <= token < vocabulary for token in self.tokens[:nodes])

    def __len__(self) -> int:
        return len(self.tokens)


class Nodes(Protocol):
    """Rows below the last token's: a `Draft`, or a `Drafted`."""

    @property
    def tokens(self) -> Sequence[int]:
        """`NO_TOKEN` for look-ahead rows."""

    @property
    def parents(self) -> Sequence[int]:
        """Each row's: a row before it, or `ROOT`."""


class PlannedDraft(Draft):
    """What was planned, as a draft.

    Args:
        planned: its rows.
        vectors: the embeddings of a look-ahead row, by its place below a node.
        top_k: as of any draft.
    """

    def __init__(self, planned: Drafted, vectors: Sequence[Tensor], top_k: int) -> None:
        self.planned, self.vectors, self.top_k = planned, vectors, top_k
        self.expected = planned.expected
        self.wanted, self.read_only, self._children = None, _NO_ROWS, {}

    @cached_property
    def tokens(self) -> list[int]:  # type: ignore[override]
        """Made when someone asks, as what follows is."""
        return self.planned.tokens

    @cached_property
    def parents(self) -> list[int]:  # type: ignore[override]
        """Of each row."""
        return self.planned.parents

    @cached_property
    def owners(self) -> dict[int, list[str]]:  # type: ignore[override]
        """The source of each row."""
        return dict(enumerate(map(_OWNERS.__getitem__, self.planned.sources)))

    @cached_property
    def embeddings(self) -> dict[int, Tensor]:  # type: ignore[override]
        """Of look-ahead rows."""
        found: dict[int, Tensor] = {}
        for node, _ in self.planned.chains:
            found.update(zip(self.chain(node), self.vectors, strict=False))
        return found

    def chain(self, node: int) -> range:
        """The look-ahead rows below a node (or `ROOT`)."""
        first, count = self.planned.chain(node)
        return range(first, first + count)

    def fits(self, vocabulary: int) -> bool:
        """Whether each row has a token of so many, or an embedding, which look-ahead rows alone have."""
        return self.planned.fits(vocabulary)

    def tree(self, pending: list[int]) -> TokenTree:
        """The step's rows: tokens that are not in the cache yet, and the draft below the last of them."""
        planned = self.planned
        if len(pending) > 1 or isinstance(planned, PlainDrafted) or not len(planned):
            return super().tree(pending)
        return NativeTree(planned, self.vectors)

    def __len__(self) -> int:
        return len(self.planned)

"""What a drafter is: it proposes a trie of tokens below row 0 and observes the step's results."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from shoestring.engine.runner import RowResults
from shoestring.engine.tokentree import NO_TOKEN, TokenTree

__all__ = ["NO_DRAFT", "ROOT", "Context", "Draft", "Drafter", "StepObservation"]

ROOT = -1
"""The parent of a draft's first tokens: the last accepted token, row 0 of the step."""


@dataclass
class Context:
    """The sequence so far. `tokens` is the engine's own list: read it, don't change it."""

    tokens: list[int]
    prompt_length: int
    batch: int = 1
    """How many sequences share the step."""

    @property
    def reads_prompt(self) -> bool:
        """Whether the step is the one that ends the prompt: drafts on it are not judged, and rows add to many."""
        return len(self.tokens) == self.prompt_length

    @property
    def last(self) -> int:
        """The last accepted token, which the draft continues."""
        return self.tokens[-1]


@dataclass
class Draft:
    """A trie below the last accepted token: siblings are unique, so equal branches share their rows.

    `tokens[i]` follows node `parents[i]` (`ROOT` or an earlier node). `wanted` are the nodes whose next token is
    computed, None for all; only those can be accepted, and not those in `read_only`, which only `observe` reads.
    `top_k` asks for that many likeliest tokens per row. `expected` is how many tokens the step should give, where the
    drafter has an idea: it is judged by that, which leaves less to chance than what the step then gives.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    embeddings: dict[int, Tensor] = field(default_factory=dict)
    wanted: set[int] | None = None
    read_only: set[int] = field(default_factory=set)
    top_k: int = 0
    owners: dict[int, list[str]] = field(default_factory=dict)
    expected: float | None = None
    _children: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, branches: Iterable[Sequence[int]]) -> "Draft":
        """A draft from plain lists of tokens, each a branch below the last accepted token."""
        draft = cls()
        for branch in branches:
            draft.add_branch(branch)
        return draft

    def add(self, token: int, parent: int = ROOT) -> int:
        """Add (or find) `token` below `parent`; return its node."""
        node = self._children.get((parent, token))
        if node is None:
            node = len(self.tokens)
            self._children[parent, token] = node
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def add_branch(self, tokens: Sequence[int], parent: int = ROOT) -> int:
        """Add a chain below `parent`; return its last node (or `parent` for no tokens)."""
        for token in tokens:
            parent = self.add(token, parent)
        return parent

    def add_embedding(self, embedding: Tensor, parent: int = ROOT) -> int:
        """Add a row [E] without a token below `parent`; it is never accepted, only read."""
        node = len(self.tokens)
        self.tokens.append(NO_TOKEN)
        self.parents.append(parent)
        self.embeddings[node] = embedding
        return node

    def depth(self, node: int) -> int:
        """1 for a node directly below the last accepted token."""
        depth = 0
        while node != ROOT:
            node, depth = self.parents[node], depth + 1
        return depth

    def clipped(self, most_depth: int) -> "Draft":
        """This draft without nodes deeper than `most_depth` (the context limit); node numbers change."""
        clipped, numbers = (
            Draft(top_k=self.top_k, wanted=None if self.wanted is None else set()),
            {ROOT: ROOT},
        )
        depths = {ROOT: 0}
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent not in numbers or depths[parent] >= most_depth:
                continue
            depths[node] = depths[parent] + 1
            if node in self.embeddings:
                numbers[node] = clipped.add_embedding(self.embeddings[node], numbers[parent])
            else:
                numbers[node] = clipped.add(token, numbers[parent])
            if self.wanted is not None and clipped.wanted is not None and node in self.wanted:
                clipped.wanted.add(numbers[node])
            if node in self.read_only:
                clipped.read_only.add(numbers[node])
            if node in self.owners:
                clipped.owners[numbers[node]] = self.owners[node]
        return clipped

    def fits(self, vocabulary: int) -> bool:
        """Whether each row has a token of so many, or an embedding: one with both could be accepted with another row's
        keys and values.
        """
        tokens, embeddings = self.tokens, self.embeddings
        return not tokens or (
            max(tokens) < vocabulary
            and min(tokens) >= NO_TOKEN
            and tokens.count(NO_TOKEN) == len(embeddings)
            and all(tokens[node] == NO_TOKEN for node in embeddings)
        )

    def tree(self, pending: list[int]) -> TokenTree:
        """The step's rows: tokens that are not in the cache yet, and the draft below the last of them."""
        first = len(pending)
        if not self.tokens:
            return TokenTree.chain([*pending])
        embeddings = None
        if self.embeddings:
            embeddings = {first + node: vector for node, vector in self.embeddings.items()}
        return TokenTree(
            [*pending, *self.tokens],
            [*range(-1, first - 1), *[first + parent for parent in self.parents]],
            embeddings,
        )

    def __len__(self) -> int:
        return len(self.tokens)


NO_DRAFT = Draft()
"""Nothing, from a drafter that rests; nobody changes it."""


@dataclass(slots=True)
class StepObservation:
    """What became of a draft: the tokens that the step emitted, and every wanted row's results.

    `accepted` are the draft's nodes on the accepted path; `emitted` has one token more. `context` already holds
    the emitted tokens.
    """

    context: Context
    draft: Draft
    emitted: Sequence[int]
    accepted: Sequence[int]
    results: RowResults
    first_row: int
    """The row of node 0: the rows before it are the last accepted token's, and a prompt's."""

    def has(self, node: int) -> bool:
        """Whether the node's outputs were computed."""
        return self.results.has(self.first_row + node)

    def argmax(self, node: int) -> int:
        """The likeliest token after a node (`ROOT`: after the last accepted token)."""
        return self.results.argmax(self.first_row + node)

    def next_token(self, node: int) -> int:
        """The token that follows a node under the sequence's sampling options."""
        return self.results.next_token(self.first_row + node)

    def top_k(self, node: int) -> list[int]:
        """The likeliest tokens after a node, as many as the draft asked for."""
        return self.results.top_k(self.first_row + node)

    def every_top_k(self) -> np.ndarray:
        """`top_k` of the last accepted token, and of each node: int32 [1 + nodes, k]."""
        first = self.first_row
        return self.results.top_k_table(range(first + ROOT, first + len(self.draft)))

    def candidates(self, nodes: Sequence[int], count: int) -> list[list[int]]:
        """Per node, tokens likely to follow it, best first, no more than the draft's `top_k`: for drafts."""
        first = self.first_row
        if isinstance(nodes, range):
            return self.results.candidates(range(first + nodes.start, first + nodes.stop), count)
        return self.results.candidates([first + node for node in nodes], count)


@runtime_checkable
class Drafter(Protocol):
    """One per sequence: state must not leak between requests.

    `propose` may return a `Draft` or plain lists of tokens. A draft that is clipped at the context limit is
    observed as clipped (`step.draft` is then another object than was proposed).

    A drafter may have three things more. `propose_together(drafters, contexts, budget)`, a static method, is `propose` for
    several sequences of a step, where a device waits for it. `close()` gives back what it holds when its sequence ends.
    `governor`, which the sequences that share steps share, rests it where its drafts lose: it neither proposes nor observes
    then.
    """

    def begin(self, prompt: Sequence[int]) -> None:
        """A new sequence starts."""

    def propose(self, context: Context, budget: int) -> Draft | Sequence[Sequence[int]]:
        """Branches below the last token, best first, in at most `budget` rows."""

    def observe(self, step: StepObservation) -> None:
        """See the step's results before the next proposal."""

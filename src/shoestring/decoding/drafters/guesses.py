"""Guesses at the next token, and the trie they grow best-first: the plain twin of `native/drafting.cpp`.

Every source guesses the next token of every node; how often each kind of guess (source, match length, rank) came true
is counted while decoding, and how much more a token deserves that several sources guess. A node's chance is the product of
its tokens' chances along the path.
"""

import functools
import heapq
import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shoestring.decoding.drafters.datastore import Datastore
from shoestring.decoding.drafters.ngram import SuffixIndex
from shoestring.decoding.drafters.planned import Drafted, Nodes, PlainDrafted
from shoestring.decoding.drafters.protocol import ROOT
from shoestring.decoding.drafters.rates import (
    MOST_CERTAIN,
    SOURCES,
    AcceptanceRates,
    Agreement,
    Guess,
    drafting_part,
)
from shoestring.decoding.drafters.recycle import SuccessorTable
from shoestring.decoding.tune import TAUGHT, best_rows
from shoestring.engine.tokentree import NO_TOKEN

__all__ = ["Guesses", "PlainGuesses", "make_guesses", "plan_rows"]

_MOST_RANK = 32  # of a source's guesses
_PAIRS = 200_000
_SLACK = 1 + 1e-9  # sums round: nothing that may be as good as the best is given up

Predictions = Sequence[Sequence[int]]
"""Per position after the last token, tokens that may stand there, best first (PaSS)."""
Grown = tuple[list[int], list[int], list[int], list[float]]
"""Nodes in the order in which they were taken: tokens, parents, sources (an index of `SOURCES`), chances."""


class Guesses(Protocol):
    """What is known of one sequence, and the trie that it suggests."""

    def set_known(self, known: np.ndarray) -> None:
        """Successors of each token known beforehand, int32 [tokens, width], best first."""

    def set_datastore(self, datastore: Any) -> None:
        """Texts that the model wrote before: a `Datastore` for the plain guesses, its `native` form for the native ones."""

    def forget(self) -> None:
        """Begin another sequence."""

    def extend(self, tokens: list[int]) -> None:
        """The sequence goes on with these tokens."""

    def __len__(self) -> int: ...

    def grow(
        self, most: int, least: float, predictions: Predictions, seconds: np.ndarray | None = None
    ) -> Grown:
        """At most `most` nodes by falling chance; the first one below `least` is the last one.

        `seconds`, of a step with 0, 1, ... nodes (`StepCost.table`), ends growth where no number of further nodes can
        give more tokens per second than the best one so far; None: they cost nothing.
        """

    def draft(
        self,
        most: int,
        least: float,
        predictions: Predictions,
        seconds: np.ndarray | None,
        ahead: int,
        least_value: float,
    ) -> Drafted:
        """The first nodes of such a trie, as many as give the most tokens per second, and look-ahead rows below them.

        These compete for rows with the nodes (`plan_rows`): at most `ahead` below a node, each worth more than
        `least_value`.
        """

    def observe(
        self,
        emitted: Sequence[int],
        predictions: Predictions,
        draft: Nodes,
        accepted: Sequence[int],
        successors: np.ndarray,
    ) -> None:
        """Count which guesses at the tokens emitted behind the sequence came true; remember what a step found likely.

        Args:
            emitted: tokens that follow the sequence.
            predictions: those that the draft was made with.
            draft, accepted: what was drafted, and the accepted path.
            successors: tokens likely behind the sequence, and behind each row, int32 [1 + rows, k].
        """


def make_guesses(rates: AcceptanceRates, longest: int) -> Guesses:
    """The native guesses where the rates are native, else the plain ones."""
    if rates.native is None:
        return PlainGuesses(rates, longest)
    guesses: Any = drafting_part().Guesses(rates.native, longest, _PAIRS)
    return guesses


def plan_rows(
    parents: Sequence[int],
    chances: Sequence[float],
    gains: Sequence[float],
    least: float,
    most: int,
    seconds: np.ndarray | None,
) -> tuple[int, list[tuple[int, int]]]:
    """How many of a trie's nodes to keep and how many look-ahead rows to put below which, for the most tokens/s.

    A look-ahead row is worth the chance that the path ends above it times the chance that it alone foresees a token; it
    competes for rows with the drafted tokens.

    Args:
        parents, chances: the trie's nodes by falling chance.
        gains: by place below the token where the path ends, the chance that the row alone foresees a token; falling.
        least: rows worth no more than this are left out.
        most: rows at most.
        seconds: of a step with 0, 1, ... rows (`StepCost.table`); None: rows cost nothing.

    Returns: the number of nodes, and (node or `ROOT`, look-ahead rows) by node.
    """
    drafted = len(chances)
    ends = np.array([1.0, *chances])  # by row, the last token's first: the chance that the path ends there
    np.subtract.at(ends, np.array(parents, np.intp) + 1, chances)
    worthwhile = np.flatnonzero(ends * gains[0] > least) if gains else np.empty(0, np.intp)
    values = np.concatenate([chances, np.outer(ends[worthwhile], gains).ravel()])
    # Of equals a drafted row goes first, then the look-ahead row nearer to the token above it.
    places = np.concatenate([np.full(drafted, -1), np.tile(np.arange(len(gains)), len(worthwhile))])
    nodes = np.concatenate([np.arange(drafted), np.repeat(worthwhile - 1, len(gains))])
    # A drafted row's chance is at most its parent's, and a look-ahead row's value that of the one above it.
    order = np.lexsort((places, -values))[: max(most, 0)]
    if seconds is not None:
        expected = np.cumsum([1.0, *(values[order] + TAUGHT)])[: len(seconds)]
        order = order[: int(np.argmax(expected / seconds[: len(expected)]))]
    kept = int((order < drafted).sum())
    below = Counter(nodes[order[order >= drafted]].tolist())
    return kept, sorted((node, count) for node, count in below.items() if node < kept)


class _Speed:
    """Expected tokens of the rows taken so far, by falling chance, and the most of them per second."""

    def __init__(self, seconds: np.ndarray | None) -> None:
        self._seconds = seconds
        self._rows, self._expected = 0, 1.0
        self._fastest = 0.0 if seconds is None else 1 / seconds[0]

    def may_gain(self, chance: float) -> bool:
        """Whether some number of further rows, each with at most this chance, may give more."""
        if self._seconds is None:
            return True
        seconds = self._seconds[self._rows + 1 :]
        expected = self._expected + np.arange(1, len(seconds) + 1) * (chance + TAUGHT)
        return bool((expected * _SLACK > self._fastest * seconds).any())

    def take(self, chance: float) -> None:
        """Take another row."""
        self._rows += 1
        self._expected += chance + TAUGHT
        if self._seconds is not None and self._rows < len(self._seconds):
            self._fastest = max(self._fastest, self._expected / self._seconds[self._rows])


@dataclass
class _Candidate:
    """A token that is guessed: its chance by its most promising guess, whose that is, and all sources that guess it."""

    chance: float
    source: str
    every: set[str]

    @property
    def others(self) -> int:
        """How many more sources guess it."""
        return len(self.every) - 1


class PlainGuesses:
    """Suffix matches, recycled successors, PaSS's predictions and a datastore's, of one sequence.

    Args:
        rates: acceptance rates, which other sequences may share.
        longest: tokens of a suffix that is looked for.
    """

    def __init__(self, rates: AcceptanceRates, longest: int) -> None:
        self._rates, self._longest = rates, longest
        self._known: list[list[int]] = []
        self._datastore: Datastore | None = None
        self.forget()

    def set_known(self, known: np.ndarray) -> None:
        """Successors of each token known beforehand, int32 [tokens, width], best first."""
        self._known = known[:, :_MOST_RANK].tolist()

    def set_datastore(self, datastore: Datastore) -> None:
        """Texts that the model wrote before."""
        self._datastore = datastore

    def forget(self) -> None:
        """Begin another sequence."""
        self._agreement = Agreement()
        self._tokens: list[int] = []
        self._index = SuffixIndex(self._longest)
        self._table = SuccessorTable(_PAIRS)

    def extend(self, tokens: list[int]) -> None:
        """The sequence goes on with these tokens."""
        self._tokens += tokens
        self._index.extend(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def grow(
        self, most: int, least: float, predictions: Predictions, seconds: np.ndarray | None = None
    ) -> Grown:
        """At most `most` nodes by falling chance; growth ends as `Guesses.grow` says."""
        tokens: list[int] = []
        parents: list[int] = []
        sources: list[int] = []
        chances: list[float] = []
        heap: list[tuple[float, int, int, int | None, str, tuple[int, ...]]] = []
        depths = {ROOT: 0}
        orders = itertools.count()
        speed = _Speed(None if seconds is None else seconds[: max(most, 0) + 1])

        def look_below(node: int, chance: float, tail: tuple[int, ...]) -> None:
            candidates = self._weighed(tail, depths[node], predictions, self._agreement)
            for token, one in candidates.items():
                below = (*tail[1 - self._longest :], token)
                heapq.heappush(heap, (-(chance * one.chance), next(orders), node, token, one.source, below))

        if most > 0 and self._tokens:
            look_below(ROOT, 1.0, tuple(self._tokens[-self._longest :]))
        while heap and len(tokens) < most and speed.may_gain(-heap[0][0]):
            negative, _, parent, token, source, tail = heapq.heappop(heap)
            if token is None:
                look_below(parent, chances[parent], tail)
                continue
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            sources.append(SOURCES.index(source))
            chances.append(-negative)
            speed.take(-negative)
            depths[node] = depths[parent] + 1
            if -negative < least:
                break
            # Nobody looks at what may stand below a node before its turn would come at best.
            heapq.heappush(heap, (negative * MOST_CERTAIN, next(orders), node, None, "", tail))
        return tokens, parents, sources, chances

    def draft(
        self,
        most: int,
        least: float,
        predictions: Predictions,
        seconds: np.ndarray | None,
        ahead: int,
        least_value: float,
    ) -> Drafted:
        """The first nodes of such a trie, as many as give the most tokens per second, and look-ahead rows below them."""
        tokens, parents, sources, chances = self.grow(most, least, predictions, seconds)
        if seconds is not None:
            chances = chances[: best_rows(chances, seconds)]
        alone = [self._rates.rate(("only pass", place, 0)) for place in range(1, ahead + 1)]
        gains = list(itertools.accumulate(alone, min))
        count, chains = plan_rows(parents[: len(chances)], chances, gains, least_value, most, seconds)
        tokens, parents, sources = tokens[:count], parents[:count], sources[:count]
        # Added up in order, as the native guesses do.
        expected = functools.reduce(operator.add, chances[:count], 1.0)
        for node, rows in chains:
            parents += [node, *range(len(tokens), len(tokens) + rows - 1)]
            tokens += [NO_TOKEN] * rows
            sources += [len(SOURCES)] * rows
        return PlainDrafted(tokens, parents, sources, chains, expected)

    def observe(
        self,
        emitted: Sequence[int],
        predictions: Predictions,
        draft: Nodes,
        accepted: Sequence[int],
        successors: np.ndarray,
    ) -> None:
        """Count which guesses at the tokens emitted behind the sequence came true; remember what a step found likely."""
        if not self._tokens:
            return
        likely: list[list[int]] = successors.tolist()
        self._judge(emitted, predictions)
        tokens, parents = draft.tokens, draft.parents
        # By node, ROOT (-1) at the end: its token, and the one before it.
        drafted = [*tokens, self._tokens[-1]]
        before = [*(drafted[parent] for parent in parents), self._tokens[-2] if len(self._tokens) > 1 else -1]
        # What the accepted path shows holds longest, then what the likeliest rows do.
        path = {*accepted}
        others = [
            node for node in range(len(tokens) - 1, ROOT, -1) if node not in path and tokens[node] != NO_TOKEN
        ]
        for node in [*others, ROOT, *accepted]:
            self._table.update(before[node], drafted[node], likely[node + 1])

    def _judge(self, emitted: Sequence[int], predictions: Predictions) -> None:
        text = [*self._tokens[-self._longest :], *emitted]
        start = len(text) - len(emitted)
        for depth, token in enumerate(emitted):
            tail = tuple(text[max(0, start + depth - self._longest) : start + depth])
            for guessed, one in self._weighed(tail, depth, predictions, None).items():
                self._agreement.observe(one.chance, one.source, one.others, guessed == token)
            right = set()
            for guessed, guess in list(self._found(tail, depth, predictions)):
                self._rates.observe(guess, guessed == token)
                if guessed == token:
                    right.add(guess[0])
            if depth < len(predictions):
                self._rates.observe(("only pass", depth + 1, 0), right == {"pass"})
        for depth in range(len(emitted), len(predictions)):
            self._rates.observe(("only pass", depth + 1, 0), False)

    def _weighed(
        self,
        tail: tuple[int, ...],
        depth: int,
        predictions: Predictions,
        agreement: Agreement | None,
    ) -> "dict[int, _Candidate]":
        """Each guessed next token, by its most promising guess; `agreement`: what its chance is corrected by."""
        weighed: dict[int, _Candidate] = {}
        for token, guess in self._found(tail, depth, predictions):
            rate, source = self._rates.rate(guess), guess[0]
            known = weighed.get(token)
            if known is None:
                weighed[token] = _Candidate(rate, source, {source})
                continue
            known.every.add(source)
            if rate > known.chance:
                known.chance, known.source = rate, source
        if agreement is not None:
            for one in weighed.values():
                one.chance = agreement.corrected(one.chance, one.source, one.others)
        # Only one of them can be right: rates that add up to more than certainty contradict each other.
        # Added up in order, as the native guesses do: `sum` rounds otherwise from Python 3.12 on.
        total = functools.reduce(operator.add, (one.chance for one in weighed.values()), 0.0)
        if total > 1:
            for one in weighed.values():
                one.chance /= total
        return weighed

    def _found(
        self, tail: tuple[int, ...], depth: int, predictions: Predictions
    ) -> Iterator[tuple[int, Guess]]:
        """Guesses at what follows `tail`, which ends `depth` tokens behind the sequence's end."""
        for length in range(len(tail), 0, -1):
            matches: list[int] = []
            for position in self._index.positions(tail[-length:]):
                token = self._tokens[position]
                if token not in matches:
                    yield token, ("ngram", length, len(matches))
                    matches.append(token)
            if matches:
                break
        last = tail[-1]
        lists = [(2, self._table.after_pair(tail[-2], last))] if len(tail) > 1 else []
        lists.append((1, self._table.after(last)))
        if 0 <= last < len(self._known):
            lists.append((0, self._known[last]))
        seen: set[int] = set()
        for length, successors in lists:
            # What a longer context gave goes first, and makes the others less likely.
            kind = length + 3 if seen else length
            for rank, token in enumerate(successors[:_MOST_RANK]):
                if token not in seen:
                    seen.add(token)
                    yield token, ("recycle", kind, rank)
        if depth < len(predictions):
            for rank, token in enumerate(predictions[depth]):
                yield token, ("pass", depth + 1, rank)
        if self._datastore is not None:
            length, tokens = self._datastore.after(tail)
            for rank, token in enumerate(tokens):
                yield token, ("datastore", length, rank)

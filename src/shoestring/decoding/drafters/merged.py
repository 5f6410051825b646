"""The merged drafter behind `auto`: suffix matches and recycled successors grow one trie, best first.

Every source guesses the next token of every node; how often each kind of guess (source, match length, rank) came true
is counted while decoding. A node's chance is the product of the rates along its path, and the trie takes nodes in
order of chance for as long as they raise expected tokens per second under the measured cost of a step's rows.
"""

import heapq
from collections.abc import Iterator, Sequence

from shoestring.decoding.drafters.ngram import SuffixIndex
from shoestring.decoding.drafters.protocol import ROOT, Context, Draft, StepObservation
from shoestring.decoding.drafters.recycle import SuccessorTable
from shoestring.decoding.governor import Governor
from shoestring.decoding.tune import StepCost
from shoestring.errors import RequestError

__all__ = ["AcceptanceRates", "MergedDrafter"]

_LONGEST = 6  # tokens of a suffix that is looked for
Guess = tuple[str, int, int]
"""A kind of guess: source, length of the context that it matched, rank among that source's guesses."""


class AcceptanceRates:
    """How often each kind of guess came true, with a prior and slow forgetting."""

    _PRIOR_WEIGHT = 6.0
    _MEMORY = 200.0

    def __init__(self) -> None:
        self._counts: dict[Guess, tuple[float, float]] = {}

    def rate(self, guess: Guess) -> float:
        """The estimated chance that such a guess is right."""
        hits, trials = self._counts.get(guess, (0.0, 0.0))
        return (hits + self._PRIOR_WEIGHT * _prior(guess)) / (trials + self._PRIOR_WEIGHT)

    def observe(self, guess: Guess, hit: bool) -> None:
        """Count a guess that was put to the test."""
        hits, trials = self._counts.get(guess, (0.0, 0.0))
        if trials >= self._MEMORY:
            keep = 1 - 1 / self._MEMORY
            hits, trials = hits * keep, trials * keep
        self._counts[guess] = (hits + hit, trials + 1)


def _prior(guess: Guess) -> float:
    """A guess's rate before any is seen, rounded from `benchmarks/acceptance_rates.py`."""
    source, length, rank = guess
    first = {"ngram": (0.2, 0.5, 0.6, 0.65, 0.7, 0.8), "recycle": (0.3, 0.55)}[source]
    return first[min(length, len(first)) - 1] * (0.4 / rank if rank else 1.0)


class MergedDrafter:
    """Suffix matches and recycled top-k successors in one trie under a row budget.

    Args:
        cost: the measured cost of a step by its rows; decides how many rows earn their place. None: `budget` does.
        budget: the rows beside the last token's, whatever they cost; None leaves it to `cost`.
        top_k: successors remembered per token.
        rates: acceptance rates to start from (shared by the sequences of a request, so that all learn).
        governor: rests the drafter where the clock says that drafts lose (shared likewise); None: it never rests.
    """

    name = "auto"

    def __init__(
        self,
        cost: StepCost | None,
        budget: int | None = None,
        top_k: int = 8,
        rates: AcceptanceRates | None = None,
        governor: Governor | None = None,
    ) -> None:
        if cost is None and budget is None:
            raise RequestError("the merged drafter needs a budget or the measured cost of a step")
        self._cost, self._budget, self._top_k = cost, budget, top_k
        self._rates = rates or AcceptanceRates()
        self._governor = governor
        self._index = SuffixIndex(_LONGEST)
        self._table = SuccessorTable()
        self._tokens: list[int] = []

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the last sequence (rates are the model's, and stay)."""
        self._index = SuffixIndex(_LONGEST)
        self._table = SuccessorTable()

    def propose(self, context: Context, budget: int) -> Draft:
        """Grow the trie node by node in order of chance, then cut it where expected tokens/s is highest."""
        if self._governor is not None and not self._governor.drafts():
            return Draft()
        self._tokens = context.tokens
        self._index.extend(context.tokens)
        # A budget of the user's is obeyed; the measured cost only reaches as far as it was measured.
        cost = self._cost if self._budget is None else None
        most = min(budget, self._budget or budget)
        if cost is not None:
            most = min(most, cost.most_rows // context.batch - 1)
        draft = Draft(top_k=self._top_k)
        if most <= 0:
            return draft
        tail = tuple(context.tokens[-_LONGEST:])
        heap: list[tuple[float, int, int, int, str, tuple[int, ...]]] = []
        order = 0

        def offer(node: int, chance: float, tail: tuple[int, ...]) -> None:
            nonlocal order
            for token, (guess, rate) in self._guesses(tail).items():
                order += 1
                heapq.heappush(
                    heap, (-chance * rate, order, node, token, guess[0], (*tail[1 - _LONGEST :], token))
                )

        offer(ROOT, 1.0, tail)
        chances: list[float] = []
        while heap and len(draft) < most:
            negative, _, parent, token, source, tail = heapq.heappop(heap)
            node = draft.add(token, parent)
            draft.owners[node] = [source]
            chances.append(-negative)
            if cost is not None and -negative < 0.01:
                break
            offer(node, -negative, tail)
        rows = len(chances) if cost is None else cost.best_rows(chances, context.batch)
        return _first_nodes(draft, rows)

    def observe(self, step: StepObservation) -> None:
        """Count which guesses came true along the accepted path, then remember all rows' successors."""
        draft, tokens = step.draft, step.context.tokens
        if self._governor is not None:
            self._governor.ends(len(step.emitted), counts=step.first_row == 1)
        if not draft.top_k:
            return  # a plain step: nothing was guessed
        start = len(tokens) - len(step.emitted)
        for offset, token in enumerate(step.emitted):
            tail = tuple(tokens[max(0, start + offset - _LONGEST) : start + offset])
            for guessed, guess in self._all_guesses(tail):
                self._rates.observe(guess, guessed == token)
        before = tokens[start - 2] if start > 1 else -1
        last = tokens[start - 1]
        for node in range(ROOT, len(draft)):
            if not step.has(node):
                continue
            if node == ROOT:
                self._table.update(before, last, step.top_k(node))
            else:
                parent = draft.parents[node]
                behind = last if parent == ROOT else draft.tokens[parent]
                self._table.update(behind, draft.tokens[node], step.top_k(node))

    def _guesses(self, tail: tuple[int, ...]) -> dict[int, tuple[Guess, float]]:
        """Each guessed next token with its most promising guess."""
        best: dict[int, tuple[Guess, float]] = {}
        for token, guess in self._all_guesses(tail):
            rate = self._rates.rate(guess)
            if token not in best or rate > best[token][1]:
                best[token] = (guess, rate)
        return best

    def _all_guesses(self, tail: tuple[int, ...]) -> Iterator[tuple[int, Guess]]:
        for length in range(len(tail), 0, -1):
            found: list[int] = []
            for position in self._index.positions(tail[-length:]):
                token = self._tokens[position]
                if token not in found:
                    yield token, ("ngram", length, len(found))
                    found.append(token)
            if found:
                break
        successors = self._table.after_pair(tail[-2], tail[-1]) if len(tail) > 1 else ()
        length = 2 if successors else 1
        for rank, token in enumerate(successors or self._table.after(tail[-1])):
            yield token, ("recycle", length, rank)


def _first_nodes(draft: Draft, count: int) -> Draft:
    """The draft's first `count` nodes (parents come before children, so it stays a trie)."""
    if count >= len(draft):
        return draft
    kept = Draft(draft.tokens[:count], draft.parents[:count], top_k=draft.top_k)
    kept.owners = {node: draft.owners[node] for node in range(count)}
    return kept

"""The merged drafter behind `auto`: suffix matches, recycled successors and PaSS grow one trie, best first.

Every source guesses the next token of every node; how often each kind of guess (source, match length, rank) came true
is counted while decoding. A node's chance is the product of the rates along its path, and the trie takes nodes in
order of chance for as long as they raise expected tokens per second under the measured cost of a step's rows.
Look-ahead rows (PaSS) join where the path is likely to end, for what they alone are expected to foresee.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence

from shoestring.decoding.drafters.ngram import SuffixIndex
from shoestring.decoding.drafters.pass_tokens import LookAheadRows
from shoestring.decoding.drafters.protocol import ROOT, Context, Draft, StepObservation
from shoestring.decoding.drafters.rates import AcceptanceRates, Guess
from shoestring.decoding.drafters.recycle import SuccessorTable
from shoestring.decoding.governor import Governor
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.tune import StepCost
from shoestring.errors import RequestError

__all__ = ["MergedDrafter"]

_LONGEST = 6  # tokens of a suffix that is looked for
_CANDIDATES = 3  # tokens taken from each look-ahead row
_LEAST_VALUE = 0.002  # tokens that a look-ahead row must be expected to gain


class MergedDrafter:
    """Suffix matches, recycled top-k successors and PaSS's predictions in one trie under a row budget.

    Args:
        cost: the measured cost of a step by its rows; decides how many rows earn their place. None: `budget` does.
        budget: the rows beside the last token's, whatever they cost; None leaves it to `cost`.
        top_k: successors remembered per token.
        rates: acceptance rates to start from (shared by the sequences of a request, so that all learn).
        look_ahead: embeddings for PaSS, or None to do without it.
        governor: rests the drafter where the clock says that drafts lose (shared likewise); None: it never rests.
    """

    name = "auto"

    def __init__(
        self,
        cost: StepCost | None,
        budget: int | None = None,
        top_k: int = 8,
        rates: AcceptanceRates | None = None,
        look_ahead: LookAhead | None = None,
        governor: Governor | None = None,
    ) -> None:
        if cost is None and budget is None:
            raise RequestError("the merged drafter needs a budget or the measured cost of a step")
        self._cost, self._budget, self._top_k = cost, budget, top_k
        self._rates = rates or AcceptanceRates(look_ahead.priors if look_ahead else None)
        self._ahead = LookAheadRows(look_ahead, min(_CANDIDATES, top_k)) if look_ahead else None
        self._governor = governor
        self._index = SuffixIndex(_LONGEST)
        self._table = SuccessorTable()
        self._tokens: list[int] = []

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the last sequence (rates are the model's, and stay)."""
        if self._governor is not None:
            self._governor.begins()
        self._index = SuffixIndex(_LONGEST)
        self._table = SuccessorTable()
        if self._ahead is not None:
            self._ahead.forget()

    def propose(self, context: Context, budget: int) -> Draft:
        """Grow the trie node by node in order of chance, then cut it where expected tokens/s is highest."""
        if self._governor is not None and not self._governor.drafts():
            return Draft()
        self._tokens = context.tokens
        self._index.extend(context.tokens)
        # A budget of the user's is obeyed; the measured cost only reaches as far as it was measured.
        cost = self._cost if self._budget is None else None
        if cost is not None and self._governor is not None:
            cost = self._governor.calibrate(cost)
        most = min(budget, self._budget or budget)
        if cost is not None:
            most = min(most, cost.most_rows // context.batch - 1)
        draft = Draft(top_k=self._top_k)
        tail = tuple(context.tokens[-_LONGEST:])
        heap: list[tuple[float, int, int, int, str, tuple[int, ...]]] = []
        depths = {ROOT: 0}
        order = 0

        def offer(node: int, chance: float, tail: tuple[int, ...]) -> None:
            nonlocal order
            for token, (guess, rate) in self._guesses(tail, depths[node]).items():
                order += 1
                heapq.heappush(
                    heap, (-chance * rate, order, node, token, guess[0], (*tail[1 - _LONGEST :], token))
                )

        if most > 0:
            offer(ROOT, 1.0, tail)
        chances: list[float] = []
        while heap and len(draft) < most:
            negative, _, parent, token, source, tail = heapq.heappop(heap)
            node = draft.add(token, parent)
            draft.owners[node] = [source]
            depths[node] = depths[parent] + 1
            chances.append(-negative)
            if cost is not None and -negative < 0.01:
                break
            offer(node, -negative, tail)
        rows = len(chances) if cost is None else cost.best_rows(chances, context.batch)
        if self._ahead is None:
            return _first_nodes(draft, rows)
        return self._with_look_ahead(draft, chances[:rows], max(most, 0), cost, context.batch)

    def _with_look_ahead(
        self, draft: Draft, chances: list[float], most: int, cost: StepCost | None, batch: int
    ) -> Draft:
        """The draft's first nodes, as many as there are chances, and look-ahead rows below those where the path may end.

        A look-ahead row is worth the chance that the path ends above it times the chance that it alone foresees a
        token; it competes for rows with the drafted tokens.
        """
        rows = self._ahead
        assert rows is not None, "asked for only with look-ahead embeddings"
        ends = [1.0, *chances]
        for node, chance in enumerate(chances):
            ends[draft.parents[node] + 1] -= chance
        foreseen, gains = 1.0, []
        for position in range(1, len(rows) + 1):
            foreseen = min(foreseen, self._rates.rate(("only pass", position, 0)))
            gains.append(foreseen)
        values = [(chance, 0, node, True) for node, chance in enumerate(chances)]
        values += [
            (end * gain, -place, node - 1, False)
            for node, end in enumerate(ends)
            if end * gains[0] > _LEAST_VALUE
            for place, gain in enumerate(gains)
        ]
        # A drafted row's chance is at most its parent's, and a look-ahead row's value that of the one above it.
        values.sort(key=lambda value: (-value[0], not value[3], -value[1]))
        count = most if cost is None else cost.best_rows([value[0] for value in values[:most]], batch)
        chosen = values[:count]
        kept = _first_nodes(draft, sum(drafted for *_, drafted in chosen))
        rows.begin(kept)
        lengths = Counter(node for _, _, node, drafted in chosen if not drafted and node < len(kept))
        for node, length in lengths.items():
            rows.add(node, length)
        return kept

    def observe(self, step: StepObservation) -> None:
        """Count which guesses came true along the accepted path, then remember all rows' successors."""
        draft, tokens = step.draft, step.context.tokens
        if self._governor is not None:
            self._governor.ends(len(step.emitted), 1 + len(draft), counts=step.first_row == 1)
        if not draft.top_k:  # a plain step: nothing was guessed
            if self._ahead is not None:
                self._ahead.forget()
            return
        start = len(tokens) - len(step.emitted)
        for offset, token in enumerate(step.emitted):
            tail = tuple(tokens[max(0, start + offset - _LONGEST) : start + offset])
            guesses = list(self._all_guesses(tail, offset))
            for guessed, guess in guesses:
                self._rates.observe(guess, guessed == token)
            owners = {guess[0] for guessed, guess in guesses if guessed == token}
            if self._ahead is not None and offset < len(self._ahead.predictions):
                self._rates.observe(("only pass", offset + 1, 0), owners == {"pass"})
        if self._ahead is not None:
            for position in range(len(step.emitted), len(self._ahead.predictions)):
                self._rates.observe(("only pass", position + 1, 0), False)
            self._ahead.read(step)
        before = tokens[start - 2] if start > 1 else -1
        last = tokens[start - 1]
        for node in range(ROOT, len(draft)):
            if not step.has(node) or node in draft.embeddings:
                continue
            if node == ROOT:
                self._table.update(before, last, step.top_k(node))
            else:
                parent = draft.parents[node]
                behind = last if parent == ROOT else draft.tokens[parent]
                self._table.update(behind, draft.tokens[node], step.top_k(node))

    def _guesses(self, tail: tuple[int, ...], depth: int) -> dict[int, tuple[Guess, float]]:
        """Each guessed next token with its most promising guess."""
        best: dict[int, tuple[Guess, float]] = {}
        for token, guess in self._all_guesses(tail, depth):
            rate = self._rates.rate(guess)
            if token not in best or rate > best[token][1]:
                best[token] = (guess, rate)
        return best

    def _all_guesses(self, tail: tuple[int, ...], depth: int) -> Iterator[tuple[int, Guess]]:
        """Guesses at what follows `tail`, which ends `depth` tokens behind the step's first row."""
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
        if self._ahead is not None and depth < len(self._ahead.predictions):
            for rank, token in enumerate(self._ahead.predictions[depth]):
                yield token, ("pass", depth + 1, rank)


def _first_nodes(draft: Draft, count: int) -> Draft:
    """The draft's first `count` nodes (parents come before children, so it stays a trie)."""
    if count >= len(draft):
        return draft
    kept = Draft(draft.tokens[:count], draft.parents[:count], top_k=draft.top_k)
    kept.owners = {node: draft.owners[node] for node in range(count)}
    return kept

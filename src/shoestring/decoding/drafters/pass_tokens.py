"""PaSS (arXiv 2311.13581): rows with trained look-ahead embeddings ask the model for tokens beyond the next one.

The i-th look-ahead row below a token predicts the (i+1)-th token after it. The paper's loop takes two calls: one drafts,
one verifies. The fused form needs one: the step that verifies the last drafts carries look-ahead rows below the
tokens at which the accepted path is likely to end, and reads the next drafts off those below the one where it did.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from shoestring.decoding.drafters.planned import PlannedDraft
from shoestring.decoding.drafters.protocol import ROOT, Context, Draft, StepObservation
from shoestring.decoding.drafters.rates import AcceptanceRates
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.tune import StepCost
from shoestring.errors import RequestError

__all__ = ["LookAheadRows", "PassDrafter", "Shape", "TwoCallPassDrafter", "plan_shape"]

_LEAST_CHANCE = 0.005
_TRIED_NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_PLANNED_STEPS = 32  # rates move slowly: the tree keeps its shape for a while


class LookAheadRows:
    """A sequence's look-ahead rows: adds them to drafts, and keeps what those below the last token predicted.

    Args:
        look_ahead: the embeddings.
        candidates: how many tokens to take from each position.
    """

    def __init__(self, look_ahead: LookAhead, candidates: int) -> None:
        self.vectors = look_ahead.rows
        self.candidates = candidates
        self.predictions: list[list[int]] = []
        """Per position after the last token, tokens that may stand there, best first."""
        self._chains: dict[int, Sequence[int]] = {}
        self._draft: Draft | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def forget(self) -> None:
        """Begin a new sequence."""
        self.predictions, self._chains, self._draft = [], {}, None

    def begin(self, draft: Draft) -> None:
        """Rows are added to another draft from here on, or this one was planned with them."""
        self._chains, self._draft = {}, draft

    def add(self, node: int, count: int) -> None:
        """Add the first `count` look-ahead rows below a node of the draft."""
        assert self._draft is not None, "begin comes first"
        chain: list[int] = []
        for vector in self.vectors[:count]:
            row = self._draft.add_embedding(vector, chain[-1] if chain else node)
            self._draft.owners[row] = ["look-ahead"]
            chain.append(row)
        self._chains[node] = chain

    def read(self, step: StepObservation) -> None:
        """Take the predictions of the rows below the token at which the accepted path ended."""
        chain: Sequence[int] = ()
        draft = step.draft
        if draft is self._draft:  # else it was clipped: the context's end is near
            node = step.accepted[-1] if step.accepted else ROOT
            chain = draft.chain(node) if isinstance(draft, PlannedDraft) else self._chains.get(node, ())
        self.predictions = step.candidates(chain, self.candidates) if chain else []


@dataclass(frozen=True)
class Shape:
    """A step's rows before their tokens are known.

    Args:
        nodes: (parent, rank) of each drafted row: the candidate of that rank at the row's depth.
        chains: how many look-ahead rows stand below the last token, and below each drafted row.
    """

    nodes: tuple[tuple[int, int], ...]
    chains: tuple[int, ...]


def plan_shape(
    rates: Sequence[Sequence[float]], most_rows: int, cost: StepCost | None = None, batch: int = 1
) -> Shape:
    """The shape with the most expected tokens per second, in at most `most_rows` rows beside the last token's.

    Args:
        rates: `rates[i][r]`: the chance that the candidate of rank r is right at position i + 1 if all before it were.
        most_rows: the row budget.
        cost: a step's seconds by its rows; None: rows cost nothing.
        batch: how many sequences share a step.

    A step that has drafts emits 1 + D tokens, D the sum of its rows' chances, and the next one has drafts as far as
    look-ahead rows stood below the token at which the path ended: with the chance q that they did, 1 + D q. Drafted
    rows are taken best first, and so are look-ahead rows by what they add to q.
    """
    # Estimates may add up to more than certainty; only one candidate of a position can be right.
    rates = [[rate / max(1.0, sum(position)) for rate in position] for position in rates]
    nodes, chances = _best_first(rates, min(most_rows, _TRIED_NODES[-1]))
    seconds = [cost.of(batch * (rows + 1)) if cost else 1.0 for rows in range(most_rows + 1)]
    reach, gains = 1.0, []
    for position in rates:
        reach *= sum(position)
        gains.append(reach)
    ends = [1.0]  # the chance that the path ends at the last token, and at each drafted row
    total, drafted = sum(gains) or 1.0, 0.0
    best, best_speed = Shape((), (0,)), 1 / seconds[0]
    for count in range(1, len(nodes) + 1):
        chance = chances[count - 1]
        parent = nodes[count - 1][0] + 1
        drafted += chance
        ends.append(chance)
        ends[parent] = max(0.0, ends[parent] - chance)
        if count not in _TRIED_NODES and count != len(nodes):
            continue
        # A deeper look-ahead row never gains more than the one above it, so chains fill from their tops.
        values = sorted(
            ((end * gain, -place, node) for node, end in enumerate(ends) for place, gain in enumerate(gains)),
            reverse=True,
        )
        chains, ready = [0] * (count + 1), 0.0
        for rows, (value, _, node) in enumerate(values[: most_rows - count], 1):
            ready += value / total
            chains[node] += 1
            speed = (1 + drafted * ready) / seconds[count + rows]
            if speed > best_speed * (1 + 1e-6):
                best, best_speed = Shape(tuple(nodes[:count]), tuple(chains)), speed
    return best


def _best_first(rates: Sequence[Sequence[float]], most: int) -> tuple[list[tuple[int, int]], list[float]]:
    """Drafted rows, (parent, rank), in order of their chances; and these."""
    nodes: list[tuple[int, int]] = []
    chances: list[float] = []
    heap: list[tuple[float, int, int, int]] = []

    def offer(parent: int, depth: int, chance: float) -> None:
        if depth <= len(rates):
            for rank, rate in enumerate(rates[depth - 1]):
                heapq.heappush(heap, (-chance * rate, depth, parent, rank))

    offer(ROOT, 1, 1.0)
    while heap and len(nodes) < most:
        negative, depth, parent, rank = heapq.heappop(heap)
        if -negative < _LEAST_CHANCE:
            break
        nodes.append((parent, rank))
        chances.append(-negative)
        offer(len(nodes) - 1, depth + 1, -negative)
    return nodes, chances


class PassDrafter:
    """The fused form: one call verifies the last drafts and carries the rows that draft the next ones.

    Args:
        look_ahead: the embeddings; all are used.
        cost: the measured cost of a step by its rows; None: `budget` alone decides.
        budget: the most rows beside the last token's.
        candidates: the most tokens tried at a position; 1 drafts a chain.
        rates: acceptance rates to start from, shared by the sequences of a request.
    """

    name = "pass"

    def __init__(
        self,
        look_ahead: LookAhead,
        cost: StepCost | None = None,
        budget: int | None = None,
        candidates: int = 4,
        rates: AcceptanceRates | None = None,
    ) -> None:
        if cost is None and budget is None:
            raise RequestError("PaSS needs a budget or the measured cost of a step")
        self._rows = LookAheadRows(look_ahead, candidates)
        self._cost, self._budget = cost, budget
        self._rates = rates or AcceptanceRates(look_ahead.priors)
        self._shape: Shape | None = None
        self._planned_for = (0, 0)
        self._age = 0

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the last sequence (rates are the model's, and stay)."""
        self._rows.forget()
        self._shape = None

    def propose(self, context: Context, budget: int) -> Draft:
        """The predictions as a tree, and look-ahead rows below the tokens where the path may end."""
        most = budget if self._budget is None else min(budget, self._budget)
        if self._cost is not None:
            most = min(most, self._cost.most_rows // context.batch - 1)
        shape = self._planned(most, context.batch)
        draft, rows = Draft(top_k=self._rows.candidates), self._rows
        rows.begin(draft)
        if not rows.predictions:
            if shape.nodes:  # nothing to verify: the path ends at the last token
                rows.add(ROOT, most)
            return draft
        placed: dict[int, tuple[int, int]] = {ROOT: (ROOT, 0)}  # the shape's node -> the draft's, its depth
        for planned, (parent, rank) in enumerate(shape.nodes):
            above, depth = placed.get(parent, (ROOT, len(rows.predictions)))
            if depth < len(rows.predictions) and rank < len(rows.predictions[depth]):
                node = draft.add(rows.predictions[depth][rank], above)
                draft.owners[node] = ["pass"]
                placed[planned] = (node, depth + 1)
        for planned, (node, _) in placed.items():
            rows.add(node, shape.chains[planned + 1])
        return draft

    def observe(self, step: StepObservation) -> None:
        """Count which candidates were right, and read the next ones."""
        for position, (candidates, token) in enumerate(
            zip(self._rows.predictions, step.emitted, strict=False), 1
        ):
            for rank, candidate in enumerate(candidates):
                self._rates.observe(("pass", position, rank), candidate == token)
        self._rows.read(step)

    def _planned(self, most: int, batch: int) -> Shape:
        """The shape, planned anew every few steps."""
        if self._shape is None or self._planned_for != (most, batch) or self._age >= _PLANNED_STEPS:
            rates = [
                [self._rates.rate(("pass", position, rank)) for rank in range(self._rows.candidates)]
                for position in range(1, len(self._rows) + 1)
            ]
            self._shape = plan_shape(rates, max(most, 0), self._cost, batch)
            self._planned_for, self._age = (most, batch), 0
        self._age += 1
        return self._shape


class TwoCallPassDrafter:
    """The paper's loop: a call with the look-ahead rows gives one token and drafts, a call that verifies them one more.

    Args:
        look_ahead: the embeddings; all are used.
    """

    name = "pass"

    def __init__(self, look_ahead: LookAhead) -> None:
        self._rows = LookAheadRows(look_ahead, 1)

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the last sequence."""
        self._rows.forget()

    def propose(self, context: Context, budget: int) -> Draft:
        """In turns: the look-ahead rows, and the chain that they predicted."""
        predictions = self._rows.predictions[:budget]
        draft = Draft(top_k=1)
        self._rows.begin(draft)
        if predictions:
            draft.add_branch([candidates[0] for candidates in predictions])
        else:
            self._rows.add(ROOT, min(len(self._rows), budget))
        return draft

    def observe(self, step: StepObservation) -> None:
        """Read the predictions behind a drafting call; behind a verifying one there are none."""
        self._rows.read(step)

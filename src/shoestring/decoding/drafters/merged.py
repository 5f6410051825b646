"""The merged drafter behind `auto`: suffix matches, recycled successors, PaSS and a datastore grow one trie, best first.

`guesses.py` guesses the next token of every node and grows the trie in order of chance; here it is cut where expected
tokens per second under the measured cost of a step's rows are highest. Look-ahead rows (PaSS) join where the path is
likely to end, for what they alone are expected to foresee.
"""

import os
from collections.abc import Sequence
from functools import cache

import numpy as np

from shoestring.decoding.drafters.datastore import Datastore
from shoestring.decoding.drafters.guesses import make_guesses
from shoestring.decoding.drafters.pass_tokens import LookAheadRows
from shoestring.decoding.drafters.planned import Drafted, PlannedDraft
from shoestring.decoding.drafters.protocol import Context, Draft, StepObservation
from shoestring.decoding.drafters.rates import AcceptanceRates, drafting_part
from shoestring.decoding.governor import Governor
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.tune import StepCost
from shoestring.errors import RequestError

__all__ = ["MergedDrafter"]

_LONGEST = 6  # tokens of a suffix that is looked for
_CANDIDATES = 3  # tokens taken from each look-ahead row
_MOST_POSITIONS = 30  # of look-ahead rows whose predictions are counted
_LEAST_CHANCE = 0.01  # of a row where rows cost something
_LEAST_VALUE = 0.002  # tokens that a look-ahead row must be expected to gain
_THREADS = 4  # more gain little


@cache
def _threads() -> int:
    """How many draft together: more than one where that takes them from nobody."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _THREADS if processors >= 2 * _THREADS else 1


class MergedDrafter:
    """Suffix matches, recycled top-k successors, PaSS's predictions and a datastore's in one trie under a row budget.

    Args:
        cost: the measured cost of a step by its rows; decides how many rows earn their place. None: `budget` does.
        budget: the rows beside the last token's, whatever they cost; None leaves it to `cost`.
        top_k: successors remembered per token.
        rates: acceptance rates to start from (shared by the sequences of a request, so that all learn).
        look_ahead: embeddings for PaSS, or None to do without it.
        governor: rests the drafter where the clock says that drafts lose (shared likewise); None: it never rests.
        known: what the model finds likely after each token alone, int32 [tokens, width] (`measure_successors`).
        datastore: texts that the model wrote before (`write_texts`).
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
        known: np.ndarray | None = None,
        datastore: Datastore | None = None,
    ) -> None:
        if cost is None and budget is None:
            raise RequestError("the merged drafter needs a budget or the measured cost of a step")
        self._cost, self._budget, self._top_k = cost, budget, top_k
        self._rates = rates or AcceptanceRates(look_ahead.priors if look_ahead else None)
        self._ahead = LookAheadRows(look_ahead, min(_CANDIDATES, top_k)) if look_ahead else None
        self._most_ahead = 0 if self._ahead is None else min(len(self._ahead), _MOST_POSITIONS)
        self.governor = governor
        self._kind = (id(cost), budget, id(governor), self._most_ahead, self._rates.native is None)
        """Drafters that agree in it draft alike."""
        self._observed = 0
        """Tokens of the sequence behind the last step that it drafted for."""
        self._guesses = make_guesses(self._rates, _LONGEST)
        if known is not None:
            self._guesses.set_known(known)
        if datastore is not None:
            self._guesses.set_datastore(datastore if self._rates.native is None else datastore.native)

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the last sequence (rates are the model's, and stay)."""
        self._guesses.forget()
        if self._ahead is not None:
            self._ahead.forget()

    def propose(self, context: Context, budget: int) -> Draft:
        """Grow the trie node by node in order of chance, and cut it where expected tokens/s is highest.

        A look-ahead row is worth the chance that the path ends above it times the chance that it alone foresees a
        token; it competes for rows with the drafted tokens.
        """
        guesses = self._guesses
        self._wake(context)
        guesses.extend(context.tokens[len(guesses) :])
        most, least, seconds, ahead = self._limits(context.batch, budget)
        return self._drafted(guesses.draft(most, least, self._predictions, seconds, ahead, _LEAST_VALUE))

    @staticmethod
    def propose_together(
        drafters: "Sequence[MergedDrafter]", contexts: Sequence[Context], budget: int
    ) -> list[Draft]:
        """`propose` for sequences that share a step, side by side on a few threads."""
        first, module = drafters[0], drafting_part()
        if len({drafter._kind for drafter in drafters}) > 1 or first._rates.native is None:
            return [
                drafter.propose(context, budget) for drafter, context in zip(drafters, contexts, strict=True)
            ]
        asked = []
        for drafter, context in zip(drafters, contexts, strict=True):
            drafter._wake(context)
            asked.append((drafter._guesses, context.tokens, drafter._predictions))
        limits = first._limits(contexts[0].batch, budget)
        planned = module.draft_together(asked, *limits, _LEAST_VALUE, _threads())
        return [drafter._drafted(one) for drafter, one in zip(drafters, planned, strict=True)]

    def _wake(self, context: Context) -> None:
        if self._ahead is not None and len(context.tokens) != self._observed:
            self._ahead.forget()  # it has rested

    def _limits(self, batch: int, budget: int) -> tuple[int, float, np.ndarray | None, int]:
        """The most rows, the least chance of one, a step's seconds by its rows, and the most look-ahead rows below one."""
        # A budget of the user's is obeyed; the measured cost only reaches as far as it was measured.
        if self._cost is None or self._budget is not None:
            return min(budget, self._budget or budget), 0.0, None, self._most_ahead
        cost = self._cost if self.governor is None else self.governor.calibrate(self._cost)
        most = min(budget, cost.most_rows // batch - 1)
        return most, _LEAST_CHANCE, cost.table(max(most, 0), batch), self._most_ahead

    def _drafted(self, planned: Drafted) -> Draft:
        draft = PlannedDraft(planned, () if self._ahead is None else self._ahead.vectors, self._top_k)
        if self._ahead is not None:
            self._ahead.begin(draft)
        return draft

    @property
    def _predictions(self) -> list[list[int]]:
        if self._ahead is None:
            return []
        predictions = self._ahead.predictions
        return predictions if len(predictions) <= _MOST_POSITIONS else predictions[:_MOST_POSITIONS]

    def observe(self, step: StepObservation) -> None:
        """Count which guesses came true along the accepted path, then remember all rows' successors."""
        draft = step.draft
        predictions = self._predictions
        if self._ahead is not None:
            self._ahead.read(step)
        likely = step.every_top_k()
        planned = draft.planned if isinstance(draft, PlannedDraft) else draft  # which was clipped
        self._guesses.observe(step.emitted, predictions, planned, step.accepted, likely)
        self._observed = len(step.context.tokens)

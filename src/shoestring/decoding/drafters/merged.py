"""The merged drafter behind `auto`: suffix matches, recycled successors, PaSS and a datastore grow one trie, best first.

`guesses.py` guesses the next token of every node and grows the trie in order of chance; here it is cut where expected
tokens per second under the measured cost of a step's rows are highest. Look-ahead rows (PaSS) join where the path is
likely to end, for what they alone are expected to foresee.
"""

from collections.abc import Sequence

import numpy as np

from shoestring.decoding.drafters.datastore import Datastore
from shoestring.decoding.drafters.guesses import make_guesses
from shoestring.decoding.drafters.pass_tokens import LookAheadRows
from shoestring.decoding.drafters.planned import PlannedDraft
from shoestring.decoding.drafters.protocol import Context, Draft, StepObservation
from shoestring.decoding.drafters.rates import AcceptanceRates
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
        self.governor = governor
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
        if self._ahead is not None and len(context.tokens) != self._observed:
            self._ahead.forget()  # it has rested
        guesses.extend(context.tokens[len(guesses) :])
        # A budget of the user's is obeyed; the measured cost only reaches as far as it was measured.
        cost = self._cost if self._budget is None else None
        if cost is not None and self.governor is not None:
            cost = self.governor.calibrate(cost)
        most = min(budget, self._budget or budget)
        if cost is not None:
            most = min(most, cost.most_rows // context.batch - 1)
        least = 0.0 if cost is None else _LEAST_CHANCE
        seconds = None if cost is None else cost.table(max(most, 0), context.batch)
        ahead = 0 if self._ahead is None else min(len(self._ahead), _MOST_POSITIONS)
        planned = guesses.draft(most, least, self._predictions, seconds, ahead, _LEAST_VALUE)
        draft = PlannedDraft(planned, () if self._ahead is None else self._ahead.vectors, self._top_k)
        if self._ahead is not None:
            self._ahead.begin(draft)
        return draft

    @property
    def _predictions(self) -> list[list[int]]:
        return [] if self._ahead is None else self._ahead.predictions[:_MOST_POSITIONS]

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

"""A drafter that rests where the clock says that its drafts lose to plain steps."""

from collections.abc import Sequence

from shoestring.decoding.drafters.protocol import NO_DRAFT, Context, Draft, Drafter, StepObservation
from shoestring.decoding.governor import Governor

__all__ = ["GovernedDrafter"]


class GovernedDrafter:
    """Another drafter, whose proposals are dropped while the governor lets it rest.

    Args:
        drafter: it must bear not to see some steps.
        governor: shared by the sequences that share steps.
    """

    def __init__(self, drafter: Drafter, governor: Governor) -> None:
        self._drafter, self._governor = drafter, governor
        self.name = getattr(drafter, "name", type(drafter).__name__)

    def begin(self, prompt: Sequence[int]) -> None:
        """A new sequence starts."""
        self._governor.begins()
        self._drafter.begin(prompt)

    def propose(self, context: Context, budget: int) -> Draft | Sequence[Sequence[int]]:
        """The drafter's proposal, or nothing."""
        if context.reads_prompt or not self._governor.drafts(context.batch):
            return NO_DRAFT
        return self._drafter.propose(context, budget)

    def observe(self, step: StepObservation) -> None:
        """Time a step that the drafter drafted for, and let it see it."""
        self._drafter.observe(step)
        self._governor.ends(len(step.emitted), 1 + len(step.draft.tokens), counts=step.typical)

    def rested(self, tokens: int, typical: bool) -> None:
        """Time a step that it did not draft for."""
        self._governor.ends(tokens, counts=typical)

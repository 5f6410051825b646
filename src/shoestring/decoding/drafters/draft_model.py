"""A smaller model with the same tokenizer drafts a chain greedily: the field's baseline (arXiv 2211.17192)."""

from collections.abc import Sequence

from shoestring.decoding.drafters.protocol import Context, Draft, StepObservation
from shoestring.engine.runner import Outputs, Runner, free_slot
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree

__all__ = ["DraftModelDrafter"]


class DraftModelDrafter:
    """Drafts `tokens` tokens with the draft model's own cache.

    When the target samples, the draft model draws with the same options and the same noise: the two then agree
    more often than with greedy drafts, and the output stays that of plain sampling.

    Args:
        runner: the draft model's runner; each drafter opens a slot of its own in it.
        tokens: how many tokens to draft per step.
        sampling: the target's sampling options.
    """

    name = "draft model"

    def __init__(self, runner: Runner, tokens: int, sampling: SamplingOptions) -> None:
        self._runner, self._tokens, self._sampling = runner, tokens, sampling
        self._slot: int | None = None
        self._cached: list[int] = []

    def begin(self, prompt: Sequence[int]) -> None:
        """Open the draft model's slot on the prompt."""
        self.close()
        self._slot = free_slot(self._runner)
        reused = self._runner.open(self._slot, self._sampling, prompt)
        self._cached = list(prompt[:reused])

    def propose(self, context: Context, budget: int) -> Draft:
        """A chain of the draft model's tokens."""
        slot, tokens = self._slot, context.tokens
        limit = self._runner.max_positions
        count = min(self._tokens, budget, (limit or 1 << 62) - len(tokens))
        draft: list[int] = []
        if slot is None or count <= 0:
            return Draft()
        self._roll_back(slot, tokens)
        pending = tokens[len(self._cached) :]
        while len(draft) < count:
            tree = TokenTree.chain(pending)
            last = len(tree) - 1
            token = self._runner.step({slot: tree}, Outputs({slot: [last]}))[slot].next_token(last)
            self._runner.commit({slot: range(len(tree))})
            self._cached.extend(pending)
            draft.append(token)
            pending = [token]
        return Draft.of([draft])

    def observe(self, step: StepObservation) -> None:
        """Nothing: the next proposal rolls the cache back to the accepted tokens."""

    def close(self) -> None:
        """Release the slot."""
        if self._slot is not None:
            self._runner.release(self._slot)
            self._slot = None

    def _roll_back(self, slot: int, tokens: list[int]) -> None:
        """Reopen the slot where its cache parts from the accepted tokens."""
        agreed = 0
        while agreed < min(len(self._cached), len(tokens) - 1) and self._cached[agreed] == tokens[agreed]:
            agreed += 1
        if agreed < len(self._cached):
            self._runner.rewind(slot, agreed)
            del self._cached[agreed:]

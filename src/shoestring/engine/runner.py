"""The runner protocol: one forward pass over the token trees of several sequences, whatever body runs it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError

__all__ = [
    "NEXT_TOKENS",
    "Outputs",
    "PlainSteps",
    "RowResults",
    "Runner",
    "StepResult",
    "check_step",
    "free_slot",
]


class Outputs(NamedTuple):
    """What a step returns beyond each row's next token, and for which rows.

    Args:
        rows: slot -> rows whose outputs are wanted; a slot that is not named, or None: every row.
        top_k: how many of each row's likeliest tokens `RowResults.top_k` can return.
        logits: keep logits for `RowResults.logits` and `log_probability`.
        hidden_states: layers whose outputs are kept (0 is the embedding, as in transformers).
    """

    rows: Mapping[int, Sequence[int]] | None = None
    top_k: int = 0
    logits: bool = False
    hidden_states: tuple[int, ...] = ()

    def rows_of(self, slot: int, tree: TokenTree) -> Sequence[int]:
        """The wanted rows of one slot, ascending."""
        if self.rows is None or slot not in self.rows:
            return range(len(tree))
        rows = self.rows[slot]
        return rows if isinstance(rows, range) and rows.step == 1 else sorted(set(rows))


NEXT_TOKENS = Outputs()
"""Every row's next token and nothing else."""


class RowResults(Protocol):
    """A step's results for one slot. Asking for a row that was not wanted raises KeyError."""

    def has(self, row: int) -> bool:
        """Whether the row's outputs were computed."""

    def next_token(self, row: int) -> int:
        """The token that follows the row under the slot's sampling options."""

    def drawn(self) -> np.ndarray | None:
        """Every row's next token, int32 [T], where all of them are known anyway; None: each is drawn when asked for.

        A negative one stands for logits that are not finite.
        """

    def argmax(self, row: int) -> int:
        """The likeliest token, unwarped."""

    def top_k(self, row: int) -> list[int]:
        """The likeliest tokens, best first, as many as were asked for."""

    def top_k_of(self, rows: Sequence[int]) -> list[list[int]]:
        """`top_k` of several rows."""

    def top_k_table(self, rows: Sequence[int]) -> np.ndarray:
        """`top_k_of` as an array, int32 [rows, k]."""

    def candidates(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Per row, tokens likely to be the next under the slot's sampling options, best first (at most `top_k`)."""

    def logits(self, row: int) -> Tensor:
        """The row's logits [V]."""

    def log_probability(self, row: int, token: int) -> float:
        """Log-probability of `token` after the row, unwarped."""

    def hidden_state(self, row: int, layer: int) -> Tensor:
        """The row's hidden state [E] after a layer."""


StepResult = Mapping[int, RowResults]
"""Results per slot; valid until the runner's next step."""


@runtime_checkable
class Runner(Protocol):
    """One model behind one face.

    A slot is opened with a prompt, stepped and committed in turns, and released. Slots may join and leave
    between steps. `step` changes nothing that is kept; `commit` keeps some rows of the last step.
    """

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""

    @property
    def max_positions(self) -> int | None:
        """The most positions the model can be right on; None where nothing limits them."""

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations are computed in, or rounded to between layers."""

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""

    @property
    def weights(self) -> str:
        """How the weights are stored, for people: "bfloat16", "int8", "q4_1, q8_0"."""

    @property
    def description(self) -> str:
        """Which body this is, for people."""

    @property
    def slots(self) -> Collection[int]:
        """The slots that are open."""

    @property
    def row_sizes(self) -> Sequence[int]:
        """The numbers of rows that a step's are rounded up to, rising; none: it takes them as they are."""

    @property
    def asynchronous(self) -> bool:
        """Whether `step` returns while it runs; its results wait for it."""

    @property
    def settled(self) -> bool:
        """Whether the last step's time says what others of its size take: nothing was compiled or captured for it."""

    def open(self, slot: int, sampling: SamplingOptions, prompt: Sequence[int] = ()) -> int:
        """Open a slot; return how many of the prompt's first tokens are cached already (a reused prefix)."""

    def step(self, trees: Mapping[int, TokenTree], want: Outputs = NEXT_TOKENS) -> StepResult:
        """One forward pass over the slots' trees."""

    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Keep the cache entries of these rows of the last step, in order, and drop its other rows."""

    def rewind(self, slot: int, length: int) -> None:
        """Drop all cached tokens of a slot beyond the first `length`."""

    def release(self, slot: int) -> None:
        """Close a slot."""

    def warm_up(self, slots: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile now what steps of at most so many slots would wait for when they first come."""

    def clear(self) -> None:
        """Drop what is kept of released slots for prompts that would continue them."""

    def close(self) -> None:
        """Give back what the runner holds; a step after it is an error."""


class PlainSteps:
    """What holds of a runner that takes rows as they are, compiles nothing for them, and waits for its steps."""

    @property
    def row_sizes(self) -> Sequence[int]:
        """Rows are taken as they are."""
        return ()

    @property
    def asynchronous(self) -> bool:
        """Steps are waited for."""
        return False

    @property
    def settled(self) -> bool:
        """Nothing is compiled for a step."""
        return True

    def warm_up(self, slots: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Nothing is compiled for a step."""


def free_slot(runner: Runner) -> int:
    """The lowest slot number that is not open: several streams may share one runner."""
    return next(slot for slot in count() if slot not in runner.slots)


def check_step(trees: Mapping[int, TokenTree], cached: Mapping[int, int], limit: int | None) -> None:
    """Raise RequestError for a step without slots, or one that reaches beyond the positions a model is right on."""
    if not trees:
        raise RequestError("a step needs at least one slot's tree")
    for slot, tree in trees.items():
        if limit is None or cached[slot] + len(tree) <= limit:
            continue
        deepest = cached[slot] + max(tree.depths) + 1
        if deepest > limit:
            raise RequestError(f"the step reaches position {deepest} of a model with {limit}")

"""Lookahead decoding (arXiv 2402.02057): a window of Jacobi trajectories yields n-grams, a pool offers them back.

The window is part of the token tree: the parent of (level l, column i) is (l-1, i), that of (0, i) is (0, i-1).
Rows of a step: (window + guesses) * (ngram - 1).
"""

import random
from collections import OrderedDict
from collections.abc import Sequence

from shoestring.decoding.drafters.protocol import ROOT, Context, Draft, StepObservation
from shoestring.decoding.governor import Governor

__all__ = ["LookaheadDrafter", "NgramPool"]


class NgramPool:
    """token -> the most recent `guesses` continuations of it (section 3.2)."""

    def __init__(self, guesses: int) -> None:
        self._guesses = guesses
        self._pool: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def add(self, token: int, continuation: tuple[int, ...]) -> None:
        """Remember a continuation; the least recently seen one makes room."""
        entries = self._pool.setdefault(token, OrderedDict())
        entries[continuation] = None
        entries.move_to_end(continuation)
        if len(entries) > self._guesses:
            entries.popitem(last=False)

    def continuations(self, token: int) -> list[tuple[int, ...]]:
        """What may follow `token`, most recent first."""
        return list(reversed(self._pool.get(token, ())))


class LookaheadDrafter:
    """The paper's algorithm.

    Args:
        window: W, columns of the lookahead window.
        ngram: N; the window has N-1 levels, the pool's continuations N-1 tokens.
        guesses: G, the most continuations verified in a step.
        prompt_pool: also fill the pool from the prompt and the output.
        keep_window: accept window rows too, where they turn out right (needs every row's next token).
        seed: of the random first window.
    """

    name = "lookahead"

    def __init__(
        self,
        window: int,
        ngram: int,
        guesses: int,
        *,
        prompt_pool: bool = False,
        keep_window: bool = False,
        seed: int = 0,
    ) -> None:
        self.governor: Governor | None = None
        """Rests it where its drafts lose; None: it never rests."""
        self._columns, self._levels, self._guesses = window, ngram - 1, guesses
        self._prompt_pool, self._keep_window = prompt_pool, keep_window
        self._seed = seed
        self._pool = NgramPool(guesses)
        self._window: list[list[int]] = []
        self._nodes: list[list[int]] = []
        self._draft = Draft()
        self._pooled = 0

    def begin(self, prompt: Sequence[int]) -> None:
        """Draw the first window at random from the prompt."""
        self._pool = NgramPool(self._guesses)
        self._pooled = 0
        source, chance = list(prompt) or [0], random.Random(self._seed)
        # Level 0's column 0 is the last accepted token itself, put in by `propose`.
        self._window = [chance.choices(source, k=self._columns) for _ in range(self._levels)]

    def propose(self, context: Context, budget: int) -> Draft:
        """The pool's continuations of the last token, and the window (always whole: `budget` is its setting's)."""
        if self._prompt_pool:
            self._pool_text(context.tokens)
        draft = Draft()
        for continuation in self._pool.continuations(context.last):
            draft.add_branch(continuation)
        guesses = len(draft)
        window = self._window
        window[0][0] = context.last
        nodes = [[ROOT]]
        for token in window[0][1:]:
            nodes[0].append(draft.add(token, nodes[0][-1]))
        for level in range(1, self._levels):
            nodes.append(
                [draft.add(token, above) for token, above in zip(window[level], nodes[-1], strict=True)]
            )
        self._nodes, self._draft = nodes, draft
        draft.owners = {node: ["pool" if node < guesses else "window"] for node in range(len(draft))}
        if not self._keep_window:
            draft.read_only = {node for node in nodes[-1] if node >= guesses}
            draft.wanted = set(range(guesses)) | draft.read_only
        return draft

    def observe(self, step: StepObservation) -> None:
        """Add the window's n-grams to the pool and move the window on by one position."""
        if step.draft is not self._draft:
            return  # clipped: the context's end is near, and the window no longer fits
        window = self._window
        new = [step.argmax(node) for node in self._nodes[-1]]
        for column in range(self._columns):
            grams = [window[level][column] for level in range(1, self._levels)]
            self._pool.add(window[0][column], (*grams, new[column]))
        if self._levels > 1:
            # Level 1's row 0 continues the old token; the new level 0 puts the new token before its rest.
            window[0] = [step.context.last, *window[1][1:]]
            window[1:] = [*window[2:], new]
        else:
            window[0] = [step.context.last, *new[1:]]

    def _pool_text(self, tokens: list[int]) -> None:
        length = self._levels
        for start in range(self._pooled, len(tokens) - length):
            self._pool.add(tokens[start], tuple(tokens[start + 1 : start + 1 + length]))
            self._pooled = start + 1

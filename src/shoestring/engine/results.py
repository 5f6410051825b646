"""A step's results for one slot, read off logits: shared by all runners that compute them on a CPU or hand them over."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoestring.engine.sampling import SamplingOptions, likely_draws, next_token
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError

__all__ = ["NOT_ASKED", "NOT_FINITE", "SlotResults"]

NOT_ASKED = "the step was not asked for top_k"
NOT_FINITE = "the model's logits are not finite numbers (try dtype='float32')"


class SlotResults:
    """Lazy on purpose: on a CPU a row's next token is computed only where the walk comes by.

    Args:
        tree: the slot's tree.
        rows: the rows whose outputs were computed; `logits` has one row for each.
        logits: [rows, V], or None where a runner kept only what was asked for.
        hidden: layer -> hidden states [T, E] of all the tree's rows.
        sampling: how the slot's tokens are drawn.
        cached: tokens in the cache before the step.
        tokens: the slot's tokens; only the first `cached` are read.
        top_k: how many likeliest tokens of each row were asked for.
    """

    def __init__(
        self,
        tree: TokenTree,
        rows: Sequence[int],
        logits: Tensor | None,
        hidden: dict[int, Tensor],
        sampling: SamplingOptions,
        cached: int,
        tokens: Sequence[int],
        top_k: int,
    ) -> None:
        self._tree, self._all_logits, self._hidden = tree, logits, hidden
        self._rows = rows
        self._index = dict(zip(rows, range(len(rows)), strict=True))
        self._sampling, self._cached, self._tokens, self._top_k = sampling, cached, tokens, top_k
        self._next: dict[int, int] = {}

    def has(self, row: int) -> bool:
        """Whether the row's outputs were computed."""
        return row in self._index

    def next_token(self, row: int) -> int:
        """The token that follows the row under the slot's sampling options."""
        if row not in self._next:
            sampling = self._sampling
            allowed = self._tree.allowed.get(row) if self._tree.allowed else None
            if sampling.greedy and allowed is None and sampling.repetition_penalty == 1:
                self._next[row] = self.argmax(row)
            else:
                seen: Sequence[int] = ()
                if sampling.repetition_penalty != 1:
                    path = [self._tree.tokens[ancestor] for ancestor in self._tree.path(row)]
                    seen = [*self._tokens[: self._cached], *(token for token in path if token >= 0)]
                self._next[row] = next_token(
                    self._logits[self._index[row]],
                    sampling,
                    self._cached + self._tree.depths[row] + 1,
                    seen,
                    allowed,
                )
        return self._next[row]

    def drawn(self) -> np.ndarray | None:
        """Every row's next token, where all of them are known anyway."""
        return None

    def argmax(self, row: int) -> int:
        """The likeliest token, unwarped."""
        return self._argmaxes[self._index[row]]

    def top_k(self, row: int) -> list[int]:
        """The likeliest tokens, best first, as many as were asked for."""
        return self.top_k_of([row])[0]

    def top_k_of(self, rows: Sequence[int]) -> list[list[int]]:
        """`top_k` of several rows."""
        if not self._top_k:
            raise KeyError(NOT_ASKED)
        if rows == self._rows:  # those of all rows, as a draft's observer asks for them
            return self._top
        return [self._top[self._index[row]] for row in rows]

    def top_k_table(self, rows: Sequence[int]) -> np.ndarray:
        """`top_k_of` as an array, int32 [rows, k]."""
        return np.array(self.top_k_of(rows), np.int32).reshape(len(rows), -1)

    def _among(self, table: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """The rows' part of a table of all rows whose outputs were computed."""
        if not self._top_k:
            raise KeyError(NOT_ASKED)
        if rows == self._rows:
            return table
        if isinstance(rows, range) and isinstance(self._rows, range) and rows.step == self._rows.step == 1:
            first = rows.start - self._rows.start
            if first >= 0 and rows.stop <= self._rows.stop:
                return table[first : first + len(rows)]
        places = [self._index[row] for row in rows]
        if places and places == list(range(places[0], places[0] + len(places))):
            return table[places[0] : places[0] + len(places)]
        return table[places]

    def candidates(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Per row, tokens likely to be the next under the slot's sampling options, best first: for drafts."""
        if self._sampling.greedy or not rows:
            candidates: list[list[int]] = self.top_k_table(rows)[:, :count].tolist() if rows else []
            return candidates
        positions = [self._cached + self._tree.depths[row] + 1 for row in rows]
        logits = self._logits[[self._index[row] for row in rows]]
        return likely_draws(logits, self._sampling, positions, count)

    def logits(self, row: int) -> Tensor:
        """The row's logits [V]."""
        return self._logits[self._index[row]]

    def log_probability(self, row: int, token: int) -> float:
        """Log-probability of `token` after the row, unwarped."""
        return float(self._logits[self._index[row]].float().log_softmax(-1)[token])

    def hidden_state(self, row: int, layer: int) -> Tensor:
        """The row's hidden state [E] after a layer."""
        return self._hidden[layer][row]

    @property
    def _logits(self) -> Tensor:
        if self._all_logits is None:
            raise KeyError("the step was not asked for logits")
        return self._all_logits

    @functools.cached_property
    def _argmaxes(self) -> list[int]:
        values, indices = self._logits.max(dim=-1)
        if not bool(torch.isfinite(values).all()):
            raise RequestError(NOT_FINITE)
        result: list[int] = indices.tolist()
        return result

    @functools.cached_property
    def _top(self) -> list[list[int]]:
        result: list[list[int]] = self._logits.topk(self._top_k, dim=-1).indices.tolist()
        return result

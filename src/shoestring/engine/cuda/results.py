"""A CUDA step's results: tokens and logits that lie in its bucket until someone asks for them, or the next pass comes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.engine.cuda.choose import MAX_TOP
from shoestring.engine.cuda.graphs import BucketStep
from shoestring.engine.results import NOT_FINITE, SlotResults
from shoestring.engine.sampling import next_tokens
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError

__all__ = ["Chosen", "CudaResults", "Part"]

_NONE = np.empty((0, 1), np.int32)


class Chosen:
    """A pass's tokens and logits, which lie in its bucket until the next pass; who asks for them waits for it."""

    def __init__(self, step: BucketStep, outputs: int) -> None:
        self._step, self._outputs = step, outputs
        self._kept: Tensor | None = None
        self._asked = False

    @functools.cached_property
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Each output's next token, int32 [outputs], and its likeliest tokens [outputs, k] (waits)."""
        self._asked = True
        return self._step.chosen(self._outputs) if self._outputs else (_NONE[:, 0], _NONE)

    @property
    def logits(self) -> Tensor:
        """The outputs' logits [outputs, V]."""
        self._asked = True
        return self._step.logits[: self._outputs] if self._kept is None else self._kept

    def keep(self) -> None:
        """Before another pass: copy what nobody has asked for so far; who has, has had what they want."""
        if self._outputs and not self._asked:
            self._kept = self.logits.clone()
            _ = self.tokens


@dataclass(frozen=True)
class Part:
    """What a pass found for one slot: its outputs from `first` to `last`, and hidden states by layer."""

    chosen: "Chosen | Joined"
    first: int
    last: int
    hidden: dict[int, Tensor]

    @property
    def drawn(self) -> np.ndarray:
        """Next tokens, int32 [rows]."""
        return self.chosen.tokens[0][self.first : self.last]

    @property
    def top(self) -> np.ndarray:
        """Likeliest tokens, int32 [rows, k]."""
        return self.chosen.tokens[1][self.first : self.last]

    @property
    def logits(self) -> Tensor:
        """[rows, V]."""
        return self.chosen.logits[self.first : self.last]

    @classmethod
    def joined(cls, parts: "Sequence[Part]") -> "Part":
        """Passes over a tree's rows, one behind another."""
        read = [part for part in parts if part.last > part.first]
        if len(parts) == 1 or (len(read) == 1 and not read[0].hidden):
            return (read or parts)[0]  # which is not waited for
        tops = [part.top for part in parts if len(part.drawn)] or [_NONE]
        width = min(top.shape[1] for top in tops)  # all have as many as were asked for, some more
        tokens = (
            np.concatenate([part.drawn for part in parts]),
            np.concatenate([top[:, :width] for top in tops]),
        )
        joined = Joined(tokens, torch.cat([part.logits for part in parts]))
        hidden = {layer: torch.cat([part.hidden[layer] for part in parts]) for layer in parts[0].hidden}
        return cls(joined, 0, len(tokens[0]), hidden)


@dataclass(frozen=True)
class Joined:
    """Several passes' tokens and logits."""

    tokens: tuple[np.ndarray, np.ndarray]
    logits: Tensor


class CudaResults(SlotResults):
    """Tokens come with the step; logits stay on the device until someone asks."""

    def __init__(
        self, part: Part, draws: bool, tree: TokenTree, rows: Sequence[int], *arguments: Any
    ) -> None:
        super().__init__(tree, rows, None, *arguments)
        self._part, self._draws = part, draws

    def drawn(self) -> np.ndarray | None:
        """Every row's next token, where the device has drawn them."""
        if not self._draws or len(self._rows) != len(self._tree):
            return None
        return self._part.drawn

    def next_token(self, row: int) -> int:
        """The token that follows the row under the slot's sampling options."""
        if not self._draws:
            plain = self._sampling.repetition_penalty == 1 and not self._tree.allowed
            return self._filtered[self._index[row]] if plain else super().next_token(row)
        token = self._drawn[self._index[row]]
        if token < 0:
            raise RequestError(NOT_FINITE)
        return token

    @property
    def _logits(self) -> Tensor:
        return self._part.logits

    @functools.cached_property
    def _drawn(self) -> list[int]:
        drawn: list[int] = self._part.drawn.tolist()
        return drawn

    def top_k_table(self, rows: Sequence[int]) -> np.ndarray:
        """`top_k_of` as an array: what the device has written, without a list for each row."""
        if self._top_k > MAX_TOP:
            return super().top_k_table(rows)
        return self._among(self._likeliest[:, : self._top_k], rows)

    @functools.cached_property
    def _likeliest(self) -> np.ndarray:
        return self._part.top

    @functools.cached_property
    def _filtered(self) -> list[int]:
        """All rows' next tokens under filters, in one go."""
        positions = [self._cached + self._tree.depths[row] + 1 for row in self._index]
        return next_tokens(self._logits, self._sampling, positions)

    @functools.cached_property
    def _argmaxes(self) -> list[int]:
        best: list[int] = self._likeliest[:, 0].tolist()
        if best and min(best) < 0:
            raise RequestError(NOT_FINITE)
        return best

    @functools.cached_property
    def _top(self) -> list[list[int]]:
        if self._top_k > MAX_TOP:
            return super()._top
        likeliest: list[list[int]] = self._likeliest[:, : self._top_k].tolist()
        return likeliest

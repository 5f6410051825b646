"""The native runner: all layers of a step in one call of C++, on the CPU, for models of the Llama family."""

import functools
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from shoestring.engine import admission
from shoestring.engine.native_cache import NativeCache
from shoestring.engine.native_weights import NativeConfig, as_native, config_of, tensors_of
from shoestring.engine.native_weights import why_not as why_not_config
from shoestring.engine.results import NOT_FINITE, SlotResults
from shoestring.engine.runner import NEXT_TOKENS, Outputs, PlainSteps, RowResults, StepResult, check_step
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.quantization import WeightMatrix, WeightType

__all__ = ["NativeRunner", "why_not", "why_not_built"]


_STORED = MappingProxyType(
    {
        WeightType.F32: "float32",
        WeightType.F16: "float16",
        WeightType.BF16: "bfloat16",
        WeightType.BF16_TILES: "bfloat16",
        WeightType.INT8_TILES: "int8",
        WeightType.INT4_TILES: "int4",
    }
)


def why_not_built() -> str | None:
    """Why there is no native step here; None where there is one."""
    try:
        from shoestring import _native  # noqa: F401
    except ImportError as error:
        return f"the native part of Shoestring is not installed ({error}); reinstall where there is a C++ compiler"
    return None


def why_not(config: Any) -> str | None:
    """Why the native step cannot run here, or not this HF text configuration; None where it can."""
    return why_not_built() or why_not_config(config.get_text_config(decoder=True))


class NativeRunner(PlainSteps):
    """Runs a Llama-like model over token trees, in C++.

    Args:
        config: the model as numbers.
        tensors: weights by HF's names below `model.`, e.g. `layers.0.mlp.up_proj.weight`, and `lm_head.weight`
            where it is not the embedding. They are read where they lie and kept alive.
        threads: of the pool, which all runners with as many threads share; None: the processors there are.
        instruction_set: one of `_native.instruction_sets()`; None: the best that this machine has.

    Raises:
        UnsupportedModelError: the native part is missing, or cannot run this model.
    """

    def __init__(
        self,
        config: NativeConfig,
        tensors: Mapping[str, WeightMatrix],
        *,
        threads: int | None = None,
        instruction_set: str | None = None,
    ) -> None:
        reason = why_not_built()
        if reason is not None:
            raise UnsupportedModelError(reason)
        from shoestring import _native

        self.config = config
        self._tensors = tensors
        try:
            self._model: Any = _native.Model(
                *as_native(config, tensors), threads or _native.available_processors(), instruction_set or ""
            )
        except ValueError as error:
            raise UnsupportedModelError(f"the native step cannot run this model: {error}") from error
        self.cache = NativeCache(self._model, config.max_positions)
        self._sampling: dict[int, SamplingOptions] = {}
        self._trees: dict[int, TokenTree] = {}

    @classmethod
    def from_module(
        cls, model: torch.nn.Module, *, quantize: str | None = None, **options: Any
    ) -> "NativeRunner":
        """A runner with the weights of a loaded HF module: float32 shared, others packed (`quantize`: how).

        Raises:
            UnsupportedModelError: the native part is missing, or cannot run this model.
        """
        reason = why_not(model.config)
        if reason is not None:
            raise UnsupportedModelError(reason)
        return cls(config_of(model, admission.max_positions(model)), tensors_of(model, quantize), **options)

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int | None:
        """The most positions the model can be right on."""
        return self.config.max_positions

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are kept in; all else is float32."""
        return torch.bfloat16 if self.config.bf16_cache else torch.float32

    @property
    def description(self) -> str:
        """What runs: the instruction set and the threads."""
        return f"native step ({self.instruction_set}, {self.threads} threads)"

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        return sum(matrix.rows * matrix.cols for matrix in self._tensors.values())

    @property
    def weights(self) -> str:
        """How the matrices are stored, the largest share first."""
        shares: dict[str, int] = {}
        for matrix in self._tensors.values():
            if matrix.rows > 1:
                name = _STORED.get(matrix.type, matrix.type.name.lower())
                shares[name] = shares.get(name, 0) + matrix.rows * matrix.cols
        return ", ".join(sorted(shares, key=lambda name: -shares[name]))

    @property
    def threads(self) -> int:
        """Threads of the pool."""
        return int(self._model.threads)

    @property
    def instruction_set(self) -> str:
        """The instruction set whose kernels run."""
        return str(self._model.instruction_set)

    @property
    def slots(self) -> Collection[int]:
        """The slots that are open."""
        return self._sampling.keys()

    def open(self, slot: int, sampling: SamplingOptions, prompt: Sequence[int] = ()) -> int:
        """Open a slot; return how many of the prompt's first tokens are cached already."""
        cached = self.cache.open(slot, prompt)
        self._sampling[slot] = sampling
        return cached

    def step(self, trees: Mapping[int, TokenTree], want: Outputs = NEXT_TOKENS) -> StepResult:
        """One forward pass over the slots' trees, packed into one sequence."""
        cached = {slot: self.cache.length(slot) for slot in trees}
        check_step(trees, cached, self.config.max_positions)
        for slot, tree in trees.items():
            self.cache.reserve(slot, len(tree))
        rows = {slot: want.rows_of(slot, tree) for slot, tree in trees.items()}
        firsts = dict(
            zip(trees, np.cumsum([0, *(len(tree) for tree in trees.values())]).tolist(), strict=False)
        )
        wanted = [firsts[slot] + row for slot in trees for row in rows[slot]]
        keep_logits = want.logits or any(self._needs_logits(slot, tree) for slot, tree in trees.items())
        best, top, logits, hidden = self._model.step(
            [self.cache.storage(slot) for slot in trees],
            list(cached.values()),
            [len(tree) for tree in trees.values()],
            np.array([token for tree in trees.values() for token in tree.tokens], np.int32),
            np.array([parent for tree in trees.values() for parent in tree.parents], np.int32),
            np.array(wanted, np.int32),
            *self._embeddings(trees, firsts),
            [self._layer(layer) for layer in want.hidden_states],
            want.top_k,
            keep_logits,
        )
        self._trees = dict(trees)
        all_logits = None if logits is None else torch.from_numpy(logits)
        states = {
            layer: torch.from_numpy(array) for layer, array in zip(want.hidden_states, hidden, strict=True)
        }
        results: dict[int, RowResults] = {}
        first = 0
        for slot, tree in trees.items():
            last = first + len(rows[slot])
            results[slot] = _NativeResults(
                best[first:last],
                top[first:last],
                tree,
                rows[slot],
                None if all_logits is None else all_logits[first:last],
                {layer: array[firsts[slot] : firsts[slot] + len(tree)] for layer, array in states.items()},
                self._sampling[slot],
                cached[slot],
                self.cache.tokens(slot),
                want.top_k,
            )
            first = last
        return results

    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Keep these rows of the last step."""
        for slot, rows in paths.items():
            tree = self._trees[slot]
            self.cache.commit(slot, [tree.tokens[row] for row in rows], rows)

    def rewind(self, slot: int, length: int) -> None:
        """Drop all cached tokens beyond the first `length`."""
        self.cache.rewind(slot, length)

    def release(self, slot: int) -> None:
        """Close a slot; its cache is kept for a prompt that continues it."""
        self.cache.release(slot)
        self._sampling.pop(slot)
        self._trees.pop(slot, None)

    def clear(self) -> None:
        """Drop what is kept of released slots."""
        self.cache.clear()

    def close(self) -> None:
        """Drop the cache."""
        self.cache.clear()

    def _needs_logits(self, slot: int, tree: TokenTree) -> bool:
        sampling = self._sampling[slot]
        return not sampling.greedy or sampling.repetition_penalty != 1 or bool(tree.allowed)

    def _layer(self, layer: int) -> int:
        layers = len(self.config.windows)
        if not -layers - 1 <= layer <= layers:
            raise RequestError(f"there is no hidden state {layer}; the model has {layers} layers")
        return layer % (layers + 1)

    def _embeddings(
        self, trees: Mapping[int, TokenTree], firsts: Mapping[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The packed rows that bring their own embeddings, and these."""
        rows: list[int] = []
        vectors: list[np.ndarray] = []
        for slot, tree in trees.items():
            for row, vector in (tree.embeddings or {}).items():
                rows.append(firsts[slot] + row)
                vectors.append(vector.detach().float().cpu().numpy())
        shape = (len(rows), self.config.hidden_size)
        return np.array(rows, np.int32), np.array(vectors, np.float32).reshape(shape)


class _NativeResults(SlotResults):
    """Arg-max and top-k come with the step; logits only where something needs them."""

    def __init__(self, best: list[int], top: np.ndarray, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._best, self._likeliest = best, top

    def top_k_table(self, rows: Sequence[int]) -> np.ndarray:
        """`top_k_of` as an array: what the step has found, without a list for each row."""
        return self._among(self._likeliest, rows)

    @functools.cached_property
    def _argmaxes(self) -> list[int]:
        if any(token < 0 for token in self._best):
            raise RequestError(NOT_FINITE)
        return self._best

    @functools.cached_property
    def _top(self) -> list[list[int]]:
        likeliest: list[list[int]] = self._likeliest.tolist()
        return likeliest

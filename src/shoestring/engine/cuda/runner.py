"""The CUDA runner: a Llama-like model as one CUDA graph a step, on an NVIDIA GPU."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from shoestring.engine.cuda.cache import PagedCache
from shoestring.engine.cuda.cache_moves import move_rows
from shoestring.engine.cuda.choose import MAX_TOP
from shoestring.engine.cuda.decoder import Decoder
from shoestring.engine.cuda.graphs import GRAPH_ROWS, ROW_SIZES, BucketStep, BucketSteps
from shoestring.engine.cuda.own_rows import OwnRows
from shoestring.engine.cuda.results import Chosen, CudaResults, Part
from shoestring.engine.cuda.tuning import Tuning
from shoestring.engine.runner import NEXT_TOKENS, Outputs, RowResults, StepResult, check_step
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError

__all__ = ["UNLIMITED", "CudaRunner"]

UNLIMITED = 32768
"""Positions, where nothing limits them."""


class CudaRunner:
    """Runs a Llama-like decoder over token trees with fused Triton kernels, replayed as CUDA graphs.

    Args:
        decoder: the model on its device. On a CPU (Triton's interpreter) everything runs but graphs.
        max_positions: the most positions the model can be right on.
        weights: how the matrices are stored, for people.
        parameters: how many numbers the weights hold.
        graphs: False launches every kernel of every step: the graphs' plain twin.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_positions: int | None,
        weights: str,
        parameters: int,
        graphs: bool = True,
    ) -> None:
        self._decoder, self._limit = decoder, max_positions
        self._weights, self._parameters = weights, parameters
        self.cache = PagedCache(
            decoder.block_shape, decoder.dtype, decoder.device, max_positions or UNLIMITED
        )
        self.steps = BucketSteps(decoder, self.cache.table, graphs, self._without_graphs)
        self._own = OwnRows(self.steps.buffers.own)
        self._sampling: dict[int, SamplingOptions] = {}
        self._trees: dict[int, TokenTree] = {}
        self._last: BucketStep | None = None
        self._unread: Chosen | None = None
        self.settled = True
        """Whether the last step compiled or captured nothing."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self._decoder.config.vocab_size

    @property
    def max_positions(self) -> int | None:
        """The most positions the model can be right on."""
        return self._limit or UNLIMITED

    @property
    def device(self) -> torch.device:
        """Where the model is; token ids come from the host."""
        return self._decoder.device

    @property
    def row_sizes(self) -> Sequence[int]:
        """Those of the steps' buckets."""
        return ROW_SIZES

    @property
    def asynchronous(self) -> bool:
        """A step is under way when `step` returns."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What matrices, keys and values are in; sums and the residual stream are float32."""
        return self._decoder.dtype

    @property
    def description(self) -> str:
        """What runs."""
        return f"fused step ({'CUDA graphs' if self.steps.graphs else 'Triton'}) on {self.device}"

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        return self._parameters

    @property
    def weights(self) -> str:
        """How the matrices are stored."""
        return self._weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that a step reads (of the embedding, only rows)."""
        return self._decoder.weight_bytes

    @property
    def tuning(self) -> Tuning:
        """How products are launched; a new one drops what has been captured."""
        return self._decoder.tuning

    @tuning.setter
    def tuning(self, tuning: Tuning) -> None:
        self._wait()
        self._decoder.tuning = tuning
        self._last = None
        self.steps.clear()

    @property
    def slots(self) -> Collection[int]:
        """The slots that are open."""
        return self._sampling.keys()

    def open(self, slot: int, sampling: SamplingOptions, prompt: Sequence[int] = ()) -> int:
        """Open a slot; return how many of the prompt's first tokens are cached already."""
        self._flush()
        cached = self.cache.open(slot, prompt)
        self._sampling[slot] = sampling
        return cached

    def step(self, trees: Mapping[int, TokenTree], want: Outputs = NEXT_TOKENS) -> StepResult:
        """One forward pass over the slots' trees, packed into one sequence."""
        cached = {slot: self.cache.length(slot) for slot in trees}
        check_step(trees, cached, self.max_positions)
        rows, total = {}, 0
        for slot, tree in trees.items():
            count = len(tree)
            self.cache.reserve(slot, count)
            rows[slot] = want.rows_of(slot, tree)
            total += count
        self._trees.update(trees)
        self.settled = True
        if total <= GRAPH_ROWS:
            found = self._pass(trees, cached, rows, want)
        else:
            found = self._passes(trees, cached, rows, want)
        results: dict[int, RowResults] = {}
        for slot, tree in trees.items():
            part = found[slot]
            results[slot] = CudaResults(
                part,
                self._draws(slot, tree),
                tree,
                rows[slot],
                {layer: part.hidden[self._layer(layer)] for layer in want.hidden_states},
                self._sampling[slot],
                cached[slot],
                self.cache.tokens(slot),
                want.top_k,
            )
        return results

    def _pass(
        self,
        trees: Mapping[int, TokenTree],
        cached: Mapping[int, int],
        rows: Mapping[int, Sequence[int]],
        want: Outputs,
    ) -> "dict[int, Part]":
        """One launch sequence or one graph: the slots' trees behind so many cached tokens."""
        total = outputs = 0
        for slot, tree in trees.items():
            total, outputs = total + len(tree), outputs + len(rows[slot])
        top_k = max(1, want.top_k if want.top_k <= MAX_TOP else 1)
        moves = self.cache.take_moves()
        step = self.steps.get(max(len(trees), len(moves)), total, top_k)
        self._wait()
        firsts = step.host.fill(
            trees,
            cached,
            {slot: self.cache.table_row(slot) for slot in trees},
            {slot: self._unfiltered(slot) for slot in trees},
            rows,
            moves,
            self._own.place(trees),
        )
        hidden = self._room_for(want.hidden_states, step.layout.bucket.rows) if want.hidden_states else {}
        self.settled = self.settled and step.settled
        if not hidden:
            self.steps.prepare(step)
        step.run(hidden)
        self._last = step
        self._unread = chosen = Chosen(step, outputs)
        parts, first = {}, 0
        for slot, tree in trees.items():
            last = first + len(rows[slot])
            own = slice(firsts[slot], firsts[slot] + len(tree))
            states = {layer: array[own] for layer, array in hidden.items()}
            parts[slot] = Part(chosen, first, last, states)
            first = last
        return parts

    def _passes(
        self,
        trees: Mapping[int, TokenTree],
        cached: Mapping[int, int],
        rows: Mapping[int, Sequence[int]],
        want: Outputs,
    ) -> "dict[int, Part]":
        """A step of many rows, piece by piece: the rows before a piece are cached already, and slots share passes."""
        parts: dict[int, list[Part]] = {slot: [] for slot in trees}
        for pieces in _pieces(trees):
            found = self._pass(
                {slot: _piece(trees[slot], first, last) for slot, (first, last) in pieces.items()},
                {slot: cached[slot] + first for slot, (first, _) in pieces.items()},
                {
                    slot: [row - first for row in rows[slot] if first <= row < last]
                    for slot, (first, last) in pieces.items()
                },
                want,
            )
            for slot, part in found.items():
                parts[slot].append(part)
        return {slot: Part.joined(found) for slot, found in parts.items()}

    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Keep these rows of the last step."""
        for slot, rows in paths.items():
            self.cache.commit(slot, self._trees[slot].tokens_of(rows), rows)

    def rewind(self, slot: int, length: int) -> None:
        """Drop all cached tokens beyond the first `length`."""
        self._flush()
        self.cache.rewind(slot, length)

    def release(self, slot: int) -> None:
        """Close a slot; its cache is kept for a prompt that continues it."""
        self._flush()
        self.cache.release(slot)
        self._sampling.pop(slot)
        self._trees.pop(slot, None)

    def warm_up(self, slots: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture the steps of at most so many slots: half a second for each doubling of their number."""
        self._flush()
        self._wait()
        self.steps.warm_up(slots, progress)

    def clear(self) -> None:
        """Drop what is kept of released slots."""
        self._wait()
        self.cache.clear()

    def close(self) -> None:
        """Drop the cache and the graphs."""
        self._wait()
        self.cache.clear()
        self.steps.clear()

    def _draws(self, slot: int, tree: TokenTree) -> bool:
        """Whether the device has drawn the slot's tokens: no filter, no penalty, no mask."""
        sampling = self._sampling[slot]
        return (
            not tree.allowed
            and sampling.repetition_penalty == 1
            and (sampling.greedy or not sampling.filtered)
        )

    def _unfiltered(self, slot: int) -> SamplingOptions:
        """What the device draws by; filters are applied to the logits, where someone asks."""
        sampling = self._sampling[slot]
        return sampling if not sampling.filtered else SamplingOptions()

    def _wait(self) -> None:
        """Until the last step has run: buffers on the host are free then, and what is not read yet is kept."""
        if self._unread is not None:
            self._unread.keep()
            self._unread = None
        if self._last is not None:
            self._last.wait()

    def _flush(self) -> None:
        """Carry out moves that wait for a next step."""
        moves = self.cache.take_moves()
        if not moves:
            return
        self._wait()
        step = self.steps.get(len(moves), 1, 1)
        step.host.fill({}, {}, {}, moves=moves)
        step.host.send()
        move_rows(
            self.cache.table,
            step.layout,
            layers=len(self._decoder.layers),
            kv_heads=self._decoder.config.num_key_value_heads,
            head_dim=self._decoder.config.head_dim,
            cache_dtype=self.dtype,
        )
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _room_for(self, layers: Sequence[int], rows: int) -> dict[int, torch.Tensor]:
        """Where a pass writes hidden states, by layer: [R, E]."""
        width = self._decoder.config.hidden_size
        return {
            layer: torch.zeros(rows, width, device=self.device)
            for layer in {self._layer(layer) for layer in layers}
        }

    def _layer(self, layer: int) -> int:
        layers = len(self._decoder.layers)
        if not -layers - 1 <= layer <= layers:
            raise RequestError(f"there is no hidden state {layer}; the model has {layers} layers")
        return layer % (layers + 1)

    def _without_graphs(self, reason: str) -> None:
        warnings.warn(
            f"CUDA graphs could not be captured ({reason}): every kernel of a step is launched on its own, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )


def _pieces(trees: Mapping[int, TokenTree]) -> Iterator[dict[int, tuple[int, int]]]:
    """For one pass after another, the rows that it takes of which tree: a piece hangs below the row in front of it.

    Raises:
        RequestError: more branching rows than a pass can have.
    """
    roots = {slot: _first_branching(tree) for slot, tree in trees.items()}
    taken = dict.fromkeys(trees, 0)
    while taken:
        room, pieces = GRAPH_ROWS, {}
        for slot, first in taken.items():
            count, root = len(trees[slot]), roots[slot]
            # Rows of a chain may be parted anywhere, those from the first branching on may not.
            last = count if count - first <= room else max(first, min(first + room, root))
            if last > first:
                pieces[slot] = first, last
                room -= last - first
        for slot, (_, last) in pieces.items():
            taken[slot] = last
            if last == len(trees[slot]):
                del taken[slot]
        yield pieces


def _first_branching(tree: TokenTree) -> int:
    """The first row that a row hangs below which is not the next one; the number of rows where there is none."""
    count, parents = len(tree), tree.parents
    branching = next((row for row in range(1, count) if parents[row] != row - 1), count)
    root = min(parents[branching:], default=count)
    if count - root > GRAPH_ROWS:
        raise RequestError(f"a tree with {count - root} branching rows; the fused step takes {GRAPH_ROWS}")
    return root


def _piece(tree: TokenTree, first: int, last: int) -> TokenTree:
    """Rows of a tree, which hang below the row in front of them."""
    return TokenTree(
        tree.tokens[first:last],
        [-1, *(parent - first for parent in tree.parents[first + 1 : last])],
        {row - first: vector for row, vector in (tree.embeddings or {}).items() if first <= row < last},
    )

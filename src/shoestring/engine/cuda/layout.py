"""A step as the GPU kernels read it: who each row is, who its ancestors are, where its keys lie.

One pinned buffer on the host, one copy, one buffer on the device. A CUDA graph of a (slots, rows) bucket reads its
layout's views, so that nothing about a step but its bucket is fixed when the graph is captured. No Triton here.

The cache is paged. A block holds `BLOCK_TOKENS` tokens of all layers, contiguous [L, 2 (keys, values), K, 64, D]; a table
[slots, blocks] holds the blocks' addresses, so the cache grows without a new capture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from shoestring.engine.native_part import native_part
from shoestring.engine.sampling import SamplingOptions, noise_keys
from shoestring.engine.tokentree import NativeTree, TokenTree
from shoestring.errors import RequestError

__all__ = [
    "BLOCK_TOKENS",
    "MAX_TREE_ROWS",
    "Bucket",
    "DeviceLayout",
    "HostLayout",
    "Moves",
    "block_shape",
    "block_table",
    "read_cache",
]

BLOCK_TOKENS = 64
"""Tokens in a block of the cache."""

MAX_TREE_ROWS = 256
"""Rows that a slot's branching tree may have; chains may have as many as the bucket."""

_WORDS = MAX_TREE_ROWS // 32
_ALIGN = 16  # int32s: kernels may assume that every view begins at 64 bytes


@dataclass(frozen=True)
class Bucket:
    """The sizes that a step is padded to.

    Args:
        slots: sequences in a step.
        rows: rows of all slots together.
        moves: rows that one slot's commit may move.
    """

    slots: int
    rows: int
    moves: int = MAX_TREE_ROWS

    def sections(self) -> dict[str, tuple[int, ...]]:
        """Each field's shape, in the buffer's order."""
        rows, slots, outputs = (self.rows,), (self.slots,), (self.rows,)
        return {
            "token": rows, "embedded": rows, "position": rows, "slot": rows, "tree_row": rows,
            "ancestors": (self.rows, _WORDS),
            "table_row": slots, "cached": slots, "first_row": slots, "row_count": slots, "is_chain": slots,
            "output_row": outputs, "key_low": outputs, "key_high": outputs, "temperature": outputs,
            "move_table_row": slots, "move_first": slots, "move_count": slots,
            "move_source": (self.slots, self.moves),
        }  # fmt: skip


@dataclass(frozen=True)
class DeviceLayout:
    """Views into one int32 buffer [bytes / 4] on the device; R rows, S slots, O outputs of the bucket."""

    bucket: Bucket
    buffer: Int32[Tensor, " N"]
    token: Int32[Tensor, " R"]
    """Token ids; 0 for rows with their own embedding and for padding."""
    embedded: Int32[Tensor, " R"]
    """0 for a token's row; else 1 more than where the row's own embedding lies."""
    position: Int32[Tensor, " R"]
    """n + depth: the rotary position."""
    slot: Int32[Tensor, " R"]
    """The row's slot among the step's; -1: padding."""
    tree_row: Int32[Tensor, " R"]
    """The row within its slot's tree: its key is stored at n + tree_row."""
    ancestors: Int32[Tensor, "R 8"]
    """Bit j of word j // 32: row j of the same tree is the row itself or an ancestor. Unset for chains."""
    table_row: Int32[Tensor, " S"]
    """The slot's row of the block table; -1: no slot."""
    cached: Int32[Tensor, " S"]
    """n, the tokens cached before the step."""
    first_row: Int32[Tensor, " S"]
    row_count: Int32[Tensor, " S"]
    is_chain: Int32[Tensor, " S"]
    output_row: Int32[Tensor, " O"]
    """The rows whose next token is chosen; -1: padding."""
    key_low: Int32[Tensor, " O"]
    """Bits of the noise key's lower half at the next token's position."""
    key_high: Int32[Tensor, " O"]
    temperature: Float[Tensor, " O"]
    """0 is greedy."""
    move_table_row: Int32[Tensor, " S"]
    """Moves of the last commit: which row of the table."""
    move_first: Int32[Tensor, " S"]
    """The storage position that the first moved row goes to; the others follow."""
    move_count: Int32[Tensor, " S"]
    move_source: Int32[Tensor, "S M"]
    """The storage positions they come from, rising, none before its target."""

    @classmethod
    def allocate(cls, bucket: Bucket, device: torch.device | str) -> "DeviceLayout":
        """A layout without rows on `device`."""
        size = sum(_padded(int(np.prod(shape))) for shape in bucket.sections().values())
        buffer = torch.zeros(size, dtype=torch.int32, device=device)
        views, at = {}, 0
        for name, shape in bucket.sections().items():
            count = int(np.prod(shape))
            views[name] = buffer[at : at + count].view(shape)
            at += _padded(count)
        views["temperature"] = views["temperature"].view(torch.float32)
        for name in ("slot", "table_row", "output_row"):
            views[name].fill_(-1)
        return cls(bucket, buffer, **views)


@dataclass(frozen=True)
class Moves:
    """What a slot's last commit kept: `rows` of its tree, to lie behind the `cached` tokens before that step."""

    table_row: int
    cached: int
    rows: Sequence[int]


class HostLayout:
    """Builds the layout of a step in pinned memory and sends it. Valid until the next `fill`.

    The copy is asynchronous: don't fill again before the step that reads it has been waited for.

    Args:
        native: let the native part fill it where that is installed; else its plain twin here does.
    """

    def __init__(self, device_layout: DeviceLayout, native: bool = True) -> None:
        bucket = device_layout.bucket
        self.device_layout = device_layout
        pinned = device_layout.buffer.device.type == "cuda"
        self._buffer = torch.zeros(len(device_layout.buffer), dtype=torch.int32, pin_memory=pinned)
        numbers = self._buffer.numpy()
        self._views: dict[str, np.ndarray] = {}
        offsets, at = [], 0
        for name, shape in bucket.sections().items():
            count = int(np.prod(shape))
            self._views[name] = numbers[at : at + count].reshape(shape)
            offsets.append(at)
            at += _padded(count)
        self._views["temperature"] = self._views["temperature"].view(np.float32)
        self._ancestor_bytes = self._views["ancestors"].view(np.uint8)
        module = native_part("StepLayout") if native else None
        self._native: Any = None
        if module is not None:
            self._native = module.StepLayout(numbers, bucket.slots, bucket.rows, bucket.moves, offsets)

    def __getitem__(self, name: str) -> np.ndarray:
        """A field of the layout as it is on the host."""
        return self._views[name]

    def fill(
        self,
        trees: Mapping[int, TokenTree],
        cached: Mapping[int, int],
        table_rows: Mapping[int, int],
        sampling: Mapping[int, SamplingOptions] | None = None,
        outputs: Mapping[int, Sequence[int]] | None = None,
        moves: Sequence[Moves] = (),
        own: Mapping[int, Sequence[int]] | None = None,
    ) -> dict[int, int]:
        """Lay the slots' trees one behind another; return each slot's first row.

        Args:
            cached: tokens in each slot's cache, its last commit's moved rows included.
            table_rows: each slot's row of the block table.
            sampling: how each slot draws; None: greedily.
            outputs: rows of each tree whose next token is chosen, in the order of `trees`; None: all.
            moves: the last commits' kept rows, where they are not simply the first ones (others cost nothing).
            own: where each slot's own embeddings lie, in the order of `tree.embeddings` (of a native tree: those of its
                `vectors`); None: at their rows of the step.

        Raises:
            RequestError: more slots, rows, outputs or moves than the bucket has, or a branching tree of more than 256 rows.
        """
        wanted = {
            slot: range(len(tree)) if outputs is None else outputs.get(slot, ())
            for slot, tree in trees.items()
        }
        if self._native is not None:
            try:
                firsts = self._fill_natively(trees, cached, table_rows, wanted, moves, own)
            except ValueError:  # it says less of what does not fit
                self._check(trees, wanted, moves)
                raise
        else:
            self._check(trees, wanted, moves)
            firsts = self._fill_trees(trees, cached, table_rows, own)
            self._fill_outputs(firsts, wanted)
            self._fill_moves(moves)
        if sampling is not None and not all(sampling[slot].greedy for slot in trees):
            self._fill_draws([sampling[slot] for slot in trees], list(map(len, wanted.values())))
        return firsts

    def send(self) -> None:
        """Copy to the device, in the current stream and without waiting."""
        self.device_layout.buffer.copy_(self._buffer, non_blocking=True)

    def _check(
        self,
        trees: Mapping[int, TokenTree],
        outputs: Mapping[int, Sequence[int]],
        moves: Sequence[Moves],
    ) -> None:
        bucket, rows = self.device_layout.bucket, sum(map(len, trees.values()))
        if len(trees) > bucket.slots or rows > bucket.rows or len(moves) > bucket.slots:
            raise RequestError(
                f"{len(trees)} slots with {rows} rows, {len(moves)} moved: the bucket has {bucket.slots} and {bucket.rows}"
            )
        count = sum(map(len, outputs.values()))
        if count > bucket.rows:
            raise RequestError(f"{count} outputs: the bucket has {bucket.rows}")
        for move in moves:
            if len(move.rows) > bucket.moves and _moved(move) > bucket.moves:
                raise RequestError(f"{_moved(move)} rows to move: the bucket has {bucket.moves}")
        for tree in trees.values():
            if len(tree) > MAX_TREE_ROWS and not tree.is_chain:
                raise RequestError(f"a branching tree of {len(tree)} rows; at most {MAX_TREE_ROWS}")

    def _fill_natively(
        self,
        trees: Mapping[int, TokenTree],
        cached: Mapping[int, int],
        table_rows: Mapping[int, int],
        outputs: Mapping[int, Sequence[int]],
        moves: Sequence[Moves],
        own: Mapping[int, Sequence[int]] | None,
    ) -> dict[int, int]:
        """What `_fill_trees`, `_fill_outputs` and `_fill_moves` do."""
        laid: list[tuple[Any, ...]] = []
        first = 0
        for slot, tree in trees.items():
            if isinstance(tree, NativeTree) and own is not None and len(outputs[slot]) == len(tree):
                laid.append((tree.draft, cached[slot], table_rows[slot], own.get(slot, ())))
                first += len(tree)
                continue
            rows: Sequence[int] = ()
            places: Sequence[int] = ()
            if tree.embeddings:
                rows = list(tree.embeddings)
                places = _places(tree, first, None if own is None else own[slot])
            laid.append(
                (tree.tokens, tree.parents, cached[slot], table_rows[slot], rows, places, outputs[slot])
            )
            first += len(tree)
        moved = [(move.table_row, move.cached, move.rows) for move in moves]
        return dict(zip(trees, self._native.fill(laid, moved), strict=True))

    def _fill_trees(
        self,
        trees: Mapping[int, TokenTree],
        cached: Mapping[int, int],
        table_rows: Mapping[int, int],
        own: Mapping[int, Sequence[int]] | None,
    ) -> dict[int, int]:
        views = self._views
        token, position = views["token"], views["position"]
        slot_of, tree_row = views["slot"], views["tree_row"]
        firsts: dict[int, int] = {}
        first = 0
        for index, (slot, tree) in enumerate(trees.items()):
            n = cached[slot]
            last = first + len(tree)
            firsts[slot] = first
            token[first:last] = tree.tokens
            views["embedded"][first:last] = 0
            if tree.embeddings:
                np.maximum(token[first:last], 0, out=token[first:last])
                places = _places(tree, first, None if own is None else own[slot])
                rows = [first + row for row in tree.embeddings]
                views["embedded"][rows] = [place + 1 for place in places]
            tree_row[first:last] = np.arange(len(tree))
            chain = tree.is_chain
            position[first:last] = tree.depths
            position[first:last] += n
            if not chain:
                self._ancestor_bytes[first:last] = _ancestor_bits(tree)
            slot_of[first:last] = index
            for name, value in (
                ("table_row", table_rows[slot]), ("cached", n), ("first_row", first), ("row_count", len(tree)),
                ("is_chain", chain),
            ):  # fmt: skip
                views[name][index] = value
            first = last
        for name in ("token", "embedded", "position", "tree_row"):
            views[name][first:] = 0
        slot_of[first:] = -1
        views["table_row"][len(trees) :] = -1
        views["row_count"][len(trees) :] = 0
        return firsts

    def _fill_outputs(self, firsts: Mapping[int, int], outputs: Mapping[int, Sequence[int]]) -> None:
        rows = [firsts[slot] + row for slot, wanted in outputs.items() for row in wanted]
        self._views["output_row"][: len(rows)] = rows
        self._views["output_row"][len(rows) :] = -1
        self._views["temperature"][:] = 0

    def _fill_draws(self, options: Sequence[SamplingOptions], counts: Sequence[int]) -> None:
        """How the outputs of each tree are drawn, where not all are greedy."""
        views, total = self._views, sum(counts)
        heat = np.array([option.temperature for option in options], np.float32)
        seeds = np.array([option.noise_seed for option in options], np.uint64)
        if len(counts) > 1:
            heat, seeds = np.repeat(heat, counts), np.repeat(seeds, counts)
        views["temperature"][:total] = heat
        keys = noise_keys(seeds, views["position"][views["output_row"][:total]] + 1).view(np.int32)
        views["key_low"][:total], views["key_high"][:total] = keys[0::2], keys[1::2]

    def _fill_moves(self, moves: Sequence[Moves]) -> None:
        views = self._views
        index = 0
        for move in moves:
            count = _moved(move)
            if not count:
                continue
            kept = len(move.rows) - count
            views["move_table_row"][index] = move.table_row
            views["move_first"][index] = move.cached + kept
            views["move_count"][index] = count
            views["move_source"][index, :count] = np.asarray(move.rows[kept:]) + move.cached
            index += 1
        views["move_count"][index:] = 0


def _places(tree: TokenTree, first: int, own: Sequence[int] | None) -> Sequence[int]:
    """Where each of a tree's embeddings lies."""
    if own is None:
        return [first + row for row in tree.embeddings or ()]
    return tree.each(own) if isinstance(tree, NativeTree) else own


def block_shape(layers: int, kv_heads: int, head_dim: int) -> tuple[int, int, int, int, int]:
    """The shape of a cache block: [L, 2, K, 64, D]."""
    return layers, 2, kv_heads, BLOCK_TOKENS, head_dim


def block_table(
    blocks: Sequence[Sequence[Tensor]], max_blocks: int, device: torch.device | str
) -> Int64[Tensor, "S B"]:
    """The addresses of each slot's blocks; the blocks must outlive the table."""
    rows = [[*(block.data_ptr() for block in row), *[0] * (max_blocks - len(row))] for row in blocks]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def read_cache(
    blocks: Sequence[Tensor], layer: int, length: int
) -> tuple[Float[Tensor, "K S D"], Float[Tensor, "K S D"]]:
    """One layer's first `length` keys and values of a slot, as plain tensors (for the kernels' twins)."""
    pages = torch.cat([block[layer] for block in blocks], dim=2)  # [2, K, S, D]
    return pages[0, :, :length], pages[1, :, :length]


def _moved(move: Moves) -> int:
    """How many of the kept rows do not lie where they belong."""
    kept = 0
    while kept < len(move.rows) and move.rows[kept] == kept:
        kept += 1
    return len(move.rows) - kept


def _padded(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _ancestor_bits(tree: TokenTree) -> Int[np.ndarray, "T 32"]:
    """Each row's ancestors and itself as 256 bits, little-endian."""
    bits: list[int] = []
    own = 1
    for parent in tree.parents:
        bits.append(own if parent < 0 else bits[parent] | own)
        own <<= 1
    packed = b"".join([row.to_bytes(4 * _WORDS, "little") for row in bits])
    return np.frombuffer(packed, np.uint8).reshape(-1, 4 * _WORDS)

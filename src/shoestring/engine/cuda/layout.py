"""A step as the GPU kernels read it: who each row is, who its ancestors are, where its keys lie.

One pinned buffer on the host, one copy, one buffer on the device. A CUDA graph of a (slots, rows) bucket reads its
layout's views, so that nothing about a step but its bucket is fixed when the graph is captured. No Triton here.

The cache is paged. A block holds `BLOCK_TOKENS` tokens of all layers, contiguous [L, 2 (keys, values), K, 64, D]; a table
[slots, blocks] holds the blocks' addresses, so the cache grows without a new capture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from shoestring.engine.sampling import SamplingOptions, noise_keys
from shoestring.engine.tokentree import TokenTree
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
    """

    def __init__(self, device_layout: DeviceLayout) -> None:
        bucket = device_layout.bucket
        self.device_layout = device_layout
        pinned = device_layout.buffer.device.type == "cuda"
        self._buffer = torch.zeros(len(device_layout.buffer), dtype=torch.int32, pin_memory=pinned)
        numbers = self._buffer.numpy()
        self._views: dict[str, np.ndarray] = {}
        at = 0
        for name, shape in bucket.sections().items():
            count = int(np.prod(shape))
            self._views[name] = numbers[at : at + count].reshape(shape)
            at += _padded(count)
        self._views["temperature"] = self._views["temperature"].view(np.float32)
        self._ancestor_bytes = self._views["ancestors"].view(np.uint8)

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
            own: where each slot's own embeddings lie, in the order of `tree.embeddings`; None: at their rows of the step.

        Raises:
            RequestError: more slots, rows, outputs or moves than the bucket has, or a branching tree of more than 256 rows.
        """
        bucket, views = self.device_layout.bucket, self._views
        counts = [len(tree) for tree in trees.values()]
        total = sum(counts)
        if len(trees) > bucket.slots or total > bucket.rows or len(moves) > bucket.slots:
            raise RequestError(
                f"{len(trees)} slots with {total} rows, {len(moves)} moved: the bucket has {bucket.slots} and {bucket.rows}"
            )
        token, position = views["token"], views["position"]
        slot_of, tree_row = views["slot"], views["tree_row"]
        firsts: dict[int, int] = {}
        first = 0
        for index, (slot, tree) in enumerate(trees.items()):
            count, n = counts[index], cached[slot]
            last = first + count
            firsts[slot] = first
            token[first:last] = tree.tokens
            views["embedded"][first:last] = 0
            if tree.embeddings:
                np.maximum(token[first:last], 0, out=token[first:last])
                places = [first + row for row in tree.embeddings]
                views["embedded"][places] = [place + 1 for place in (places if own is None else own[slot])]
            tree_row[first:last] = _ROWS[:count] if count <= len(_ROWS) else np.arange(count)
            chain = tree.is_chain
            if chain:
                np.add(tree_row[first:last], n, out=position[first:last])
            else:
                position[first:last] = tree.depths
                position[first:last] += n
                self._ancestor_bytes[first:last] = _ancestor_bits(tree)
            slot_of[first:last] = index
            for name, value in (
                ("table_row", table_rows[slot]), ("cached", n), ("first_row", first), ("row_count", count),
                ("is_chain", chain),
            ):  # fmt: skip
                views[name][index] = value
            first = last
        token[total:] = 0
        views["embedded"][total:] = 0
        position[total:] = 0
        slot_of[total:] = -1
        tree_row[total:] = 0
        used = len(trees)
        views["table_row"][used:] = -1
        views["row_count"][used:] = 0
        self._fill_outputs(trees, firsts, total, sampling, outputs)
        self._fill_moves(moves)
        return firsts

    def send(self) -> None:
        """Copy to the device, in the current stream and without waiting."""
        self.device_layout.buffer.copy_(self._buffer, non_blocking=True)

    def _fill_outputs(
        self,
        trees: Mapping[int, TokenTree],
        firsts: Mapping[int, int],
        total: int,
        sampling: Mapping[int, SamplingOptions] | None,
        outputs: Mapping[int, Sequence[int]] | None,
    ) -> None:
        views = self._views
        rows = views["output_row"]
        if outputs is None:
            counts = [len(tree) for tree in trees.values()]
            self._check_outputs(total)
            rows[:total] = _ROWS[:total] if total <= len(_ROWS) else np.arange(total)
        else:
            counts = [len(outputs.get(slot, ())) for slot in trees]
            total = sum(counts)
            self._check_outputs(total)
            rows[:total] = [firsts[slot] + row for slot in trees for row in outputs.get(slot, ())]
        rows[total:] = -1
        if sampling is None or all(sampling[slot].greedy for slot in trees):
            views["temperature"][:] = 0
            return
        options = [sampling[slot] for slot in trees]
        heat = np.array([option.temperature for option in options], np.float32)
        seeds = np.array([option.noise_seed for option in options], np.uint64)
        if len(trees) > 1:
            heat, seeds = np.repeat(heat, counts), np.repeat(seeds, counts)
        views["temperature"][:total] = heat
        keys = noise_keys(seeds, views["position"][rows[:total]] + 1).view(np.int32)
        views["key_low"][:total], views["key_high"][:total] = keys[0::2], keys[1::2]

    def _check_outputs(self, count: int) -> None:
        if count > self.device_layout.bucket.rows:
            raise RequestError(f"{count} outputs: the bucket has {self.device_layout.bucket.rows}")

    def _fill_moves(self, moves: Sequence[Moves]) -> None:
        views, limit = self._views, self.device_layout.bucket.moves
        index = 0
        for move in moves:
            kept = 0
            while kept < len(move.rows) and move.rows[kept] == kept:
                kept += 1  # it lies where it belongs
            sources = move.rows[kept:]
            if not sources:
                continue
            if len(sources) > limit:
                raise RequestError(f"{len(sources)} rows to move: the bucket has {limit}")
            views["move_table_row"][index] = move.table_row
            views["move_first"][index] = move.cached + kept
            views["move_count"][index] = len(sources)
            views["move_source"][index, : len(sources)] = np.asarray(sources) + move.cached
            index += 1
        views["move_count"][index:] = 0


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


_ROWS = np.arange(MAX_TREE_ROWS, dtype=np.int32)


def _padded(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _ancestor_bits(tree: TokenTree) -> Int[np.ndarray, "T 32"]:
    """Each row's ancestors and itself as 256 bits, little-endian."""
    if len(tree) > MAX_TREE_ROWS:
        raise RequestError(f"a branching tree of {len(tree)} rows; at most {MAX_TREE_ROWS}")
    bits: list[int] = []
    own = 1
    for parent in tree.parents:
        bits.append(own if parent < 0 else bits[parent] | own)
        own <<= 1
    packed = b"".join([row.to_bytes(4 * _WORDS, "little") for row in bits])
    return np.frombuffer(packed, np.uint8).reshape(-1, 4 * _WORDS)

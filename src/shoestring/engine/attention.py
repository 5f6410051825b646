"""Tree attention and its masks, behind transformers' `AttentionInterface` and `AttentionMaskInterface`.

Both registered functions are stateless. The step under way (which rows belong to which slot, their positions, who
descends from whom) is a context variable that the runner sets around the model's forward pass; outside a step
the functions are transformers' own SDPA, so that the model stays usable as it was.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shoestring.engine.tokentree import TokenTree

__all__ = [
    "ATTENTION_NAME",
    "Segment",
    "StepLayout",
    "active_step",
    "additive_mask",
    "current_step",
    "register_attention",
]

ATTENTION_NAME = "shoestring"


@dataclass(frozen=True)
class Segment:
    """One slot's share of a packed step: its rows among all rows, and its keys among all keys."""

    slot: int
    first_row: int
    rows: int
    first_key: int
    cached: int
    query_positions: Tensor  # [T]
    key_positions: Tensor  # [S] = cached, then the rows' own
    visible: Tensor | None  # [T, S] ancestors and cache; None: everything

    @property
    def keys(self) -> int:
        """Cached tokens and this step's rows."""
        return self.cached + self.rows


@dataclass(frozen=True)
class StepLayout:
    """How the rows of several slots are packed into one sequence `[1, sum of T]`."""

    segments: list[Segment]
    total_rows: int
    total_keys: int

    @classmethod
    def pack(
        cls, trees: Mapping[int, TokenTree], cached: Mapping[int, int], device: torch.device
    ) -> "StepLayout":
        """Lay the trees of several slots one behind another."""
        segments = []
        row = key = 0
        for slot, tree in trees.items():
            n, count = cached[slot], len(tree)
            queries = torch.tensor(tree.depths) + n
            keys = torch.cat([torch.arange(n), queries])
            visible = None
            if count > 1:
                visible = torch.ones(count, n + count, dtype=torch.bool)
                visible[:, n:] = tree.ancestor_mask()
                visible = visible.to(device)
            segments.append(Segment(slot, row, count, key, n, queries.to(device), keys.to(device), visible))
            row += count
            key += n + count
        return cls(segments, row, key)

    @property
    def positions(self) -> Tensor:
        """Position ids of all rows, `[1, sum of T]`."""
        return torch.cat([segment.query_positions for segment in self.segments])[None]


_active: ContextVar[StepLayout | None] = ContextVar("shoestring_step", default=None)


def current_step() -> StepLayout | None:
    """The layout of the step under way in this context, if any."""
    return _active.get()


@contextmanager
def active_step(layout: StepLayout) -> Iterator[None]:
    """Make `layout` the step that masks, attention and the cache refer to."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def register_attention() -> str:
    """Make tree attention known to transformers (idempotent) and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, tree_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, tree_mask)
    return ATTENTION_NAME


def tree_mask(*args: Any, **kwargs: Any) -> Bool[Tensor, "1 1 T S"] | None:
    """The mask of the step under way: the model's own `mask_function` at our positions, and the tree.

    transformers calls it once per layer type with that type's `mask_function(batch, head, query, key)` (causal,
    sliding, chunked), so windows need no code per architecture. None means that nothing is masked.
    """
    step = current_step()
    if step is None:
        from transformers.masking_utils import sdpa_mask

        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    return _packed_mask(step, kwargs["mask_function"])


def additive_mask(layout: StepLayout, dtype: torch.dtype) -> Float[Tensor, "1 1 T S"]:
    """The step's causal mask as numbers to add to scores.

    For models that compute attention themselves: transformers hands a ready-made mask [1, 1, T, S] through to it.
    """
    mask = _packed_mask(layout, lambda batch, head, query, key: key <= query)
    device = layout.segments[0].query_positions.device
    added = torch.zeros(1, 1, layout.total_rows, layout.total_keys, dtype=dtype, device=device)
    return added if mask is None else added.masked_fill_(~mask, torch.finfo(dtype).min)


def _packed_mask(step: StepLayout, function: Callable[..., Tensor]) -> Bool[Tensor, "1 1 T S"] | None:
    zero = step.segments[0].query_positions.new_zeros(1, 1)
    blocks: list[Tensor | None] = []
    for segment in step.segments:
        block = function(zero, zero, segment.query_positions[:, None], segment.key_positions[None])
        block = block.expand(segment.rows, segment.keys)
        if segment.visible is not None:
            block = block & segment.visible
        elif segment.query_positions.device.type == "cpu" and bool(block.all()):
            blocks.append(None)
            continue
        blocks.append(block)
    if all(block is None for block in blocks):
        return None
    if len(blocks) == 1:
        assert blocks[0] is not None
        return blocks[0][None, None]
    packed = torch.zeros(step.total_rows, step.total_keys, dtype=torch.bool, device=zero.device)
    for segment, filled in zip(step.segments, blocks, strict=True):
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        keys = slice(segment.first_key, segment.first_key + segment.keys)
        packed[rows, keys] = True if filled is None else filled
    return packed[None, None]


def tree_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K S D"],
    value: Float[Tensor, "1 K S Dv"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 T H Dv"], None]:
    """Attention of packed rows, slot by slot; `softcap` and sinks (`s_aux` [H]) as the model passes them."""
    step = current_step()
    if step is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap is not None or s_aux is not None:  # SDPA would leave them out
            return _attend_plainly(query, key, value, attention_mask, scaling, softcap, s_aux), None
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if len(step.segments) == 1:
        return _attend(query, key, value, attention_mask, scale, softcap, s_aux).transpose(1, 2), None
    outputs = []
    for segment in step.segments:
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        keys = slice(segment.first_key, segment.first_key + segment.keys)
        mask = None if attention_mask is None else attention_mask[:, :, rows, keys]
        outputs.append(
            _attend(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, scale, softcap, s_aux)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention outside a step, where no mask means a causal one."""
    rows, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _attend(query, key, value, mask, scale, softcap, sinks).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if softcap is None and sinks is None:
        if groups > 1 and query.shape[2] == 1:
            # One row: its group's heads become rows (the bf16 CPU kernel is 4x slower on single rows).
            heads = query.view(1, key.shape[1], groups, query.shape[3])
            out = torch.nn.functional.scaled_dot_product_attention(
                heads, key, value, attn_mask=mask, scale=scale
            )
            return out.reshape(1, query.shape[1], 1, value.shape[3])
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups > 1
        )
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, value)

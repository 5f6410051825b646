"""Next tokens of the rows, computed where the logits are: arg-max, the k likeliest, and a draw with hashed noise.

Two launches: every tile of the vocabulary finds its best, then one program per row merges them. Ties go to the lowest
token id. The noise is `shoestring.engine.sampling.noise`, so a row draws the token that `next_token` draws.
"""
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from shoestring.engine.cuda.layout import DeviceLayout
from shoestring.engine.sampling import gumbel

__all__ = ["MAX_TOP", "NOT_FINITE", "Candidates", "choose", "choose_twin"]

MAX_TOP = 16
"""The most likeliest tokens that can be asked for."""

NOT_FINITE = -1
"""The token of a row whose logits are NaN, or whose largest is infinite."""

_TILE = 2048


@dataclass(frozen=True)
class Candidates:
    """Every tile's best tokens: `[O, tiles, k + 1]`, the last of them the drawn one; `bad` [O, tiles] marks NaN and inf."""

    values: Float[Tensor, "O tiles k1"]
    tokens: Int32[Tensor, "O tiles k1"]
    bad: Int32[Tensor, "O tiles"]

    @classmethod
    def allocate(cls, outputs: int, vocab_size: int, top_k: int, device: torch.device | str) -> "Candidates":
        """Room for so many rows' `top_k` tokens."""
        assert 1 <= top_k <= MAX_TOP
        shape = (outputs, -(-vocab_size // _TILE), top_k + 1)
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape[:2], dtype=torch.int32, device=device),
        )


def choose(
    logits: Float[Tensor, "O V"],
    layout: DeviceLayout,
    candidates: Candidates,
    drawn: Int32[Tensor, " O"],
    top: Int32[Tensor, "O k"],
) -> None:
    """Write each output row's next token into `drawn` and its k likeliest tokens, best first, into `top`.

    Temperatures and noise keys are the layout's; a temperature of 0 makes `drawn` the arg-max. Rows beyond the layout's
    outputs are left as they are. A row that is not finite gives `NOT_FINITE` throughout.

    Args:
        logits: float32, or what the model computes in; rows may be strided.
        candidates: as allocated for these sizes; `k` is theirs.
    """
    outputs, vocab_size = logits.shape
    tiles, slots = candidates.values.shape[1:]
    best_kernel[(outputs, tiles)](
        logits, layout.output_row, layout.key_low, layout.key_high, layout.temperature,
        candidates.values, candidates.tokens, candidates.bad, vocab_size, logits.stride(0), tiles,
        TOP=slots - 1, TILE=_TILE, num_warps=4,
    )  # fmt: skip
    merge_best_kernel[(outputs,)](
        layout.output_row, candidates.values, candidates.tokens, candidates.bad, drawn, top, tiles,
        TOP=slots - 1, BLOCK_TILES=triton.next_power_of_2(tiles), BLOCK_TOP=triton.next_power_of_2(slots),
        num_warps=4,
    )  # fmt: skip


def choose_twin(
    logits: Float[Tensor, "O V"], layout: DeviceLayout, drawn: Int32[Tensor, " O"], top: Int32[Tensor, "O k"]
) -> None:
    """The same in plain PyTorch, row by row, with the noise of `sampling`."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    for index in range(len(logits)):
        if layout.output_row[index] < 0:
            continue
        row = logits[index].float()
        if not bool(row.max().isfinite()):
            drawn[index] = NOT_FINITE
            top[index] = NOT_FINITE
            continue
        top[index] = row.sort(descending=True, stable=True).indices[: top.shape[1]].int()
        temperature = layout.temperature[index]
        if temperature > 0:
            low, high = (int(half[index]) & 0xFFFFFFFF for half in (layout.key_low, layout.key_high))
            row = row / temperature + gumbel(tokens, low, high)
        drawn[index] = row.max(dim=0).indices.int()


@triton.jit
def _mix32(x):
    """One round of a 32-bit finaliser (sampling._mix32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(token, low, high):
    """Standard Gumbel noise of these tokens under a 64-bit key (sampling.noise)."""
    bits = _mix32(_mix32(token.to(tl.uint32) ^ low) ^ high)
    # (bits + 1/2) / 2^32, rounded once.
    uniform = (bits.to(tl.int64) * 2 + 1).to(tl.float32) * 1.1641532182693481e-10
    uniform = tl.minimum(uniform, 1 - 5.9604644775390625e-08)
    # log1p(-u) = log(w) * u / (1 - w), where w is 1 - u as rounded (Kahan).
    left = 1 - uniform
    lost = 1 - left
    exponential = tl.where(lost == 0, uniform, -tl.log(left) * (uniform / tl.where(lost == 0, 1.0, lost)))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["vocab_size", "tiles"])
def best_kernel(
    logits, output_row, key_low, key_high, temperature, values, tokens, bad, vocab_size, logits_stride, tiles,
    TOP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (outputs, tiles): a tile's best tokens, its drawn token, and whether something is not a number."""
    output, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(output_row + output) < 0:
        return
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab_size
    scores = tl.load(
        logits + tl.cast(output, tl.int64) * logits_stride + token, mask=inside, other=float("-inf")
    ).to(tl.float32)  # fmt: skip
    wrong = (scores != scores) | (scores == float("inf"))
    tl.store(bad + output * tiles + tile, tl.max(wrong.to(tl.int32), 0))
    scores = tl.where(wrong, float("-inf"), scores)
    heat = tl.load(temperature + output)
    noisy = scores
    if heat > 0:
        low = tl.load(key_low + output).to(tl.uint32, bitcast=True)
        high = tl.load(key_high + output).to(tl.uint32, bitcast=True)
        noisy = tl.div_rn(scores, heat) + _gumbel(token, low, high)
    at = (output * tiles + tile) * (TOP + 1)
    nobody = 2147483647
    left = tl.where(inside, token, nobody)
    best = tl.max(noisy, 0)
    tl.store(values + at + TOP, best)
    tl.store(tokens + at + TOP, tl.min(tl.where(noisy == best, left, nobody), 0))
    for rank in tl.static_range(TOP):
        best = tl.max(scores, 0)
        chosen = tl.min(tl.where(scores == best, left, nobody), 0)
        tl.store(values + at + rank, best)
        tl.store(tokens + at + rank, chosen)
        taken = token == chosen
        scores = tl.where(taken, float("-inf"), scores)
        left = tl.where(taken, nobody, left)


@triton.jit(do_not_specialize=["tiles"])
def merge_best_kernel(
    output_row, values, tokens, bad, drawn, top, tiles,
    TOP: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    """Grid (outputs,): the best of all tiles."""
    output = tl.program_id(0)
    if tl.load(output_row + output) < 0:
        return
    tile = tl.arange(0, BLOCK_TILES)
    rank = tl.arange(0, BLOCK_TOP)
    nobody = 2147483647
    known = tile < tiles
    wrong = tl.max(tl.load(bad + output * tiles + tile, mask=known, other=0), 0) != 0
    at = (output * tiles + tile) * (TOP + 1)
    scores = tl.load(values + at + TOP, mask=known, other=float("-inf"))
    left = tl.load(tokens + at + TOP, mask=known, other=nobody)
    best = tl.max(scores, 0)
    # The largest being -inf, no token is allowed.
    wrong = wrong | (best == float("-inf"))
    chosen = tl.min(tl.where(scores == best, left, nobody), 0)
    tl.store(drawn + output, tl.where(wrong, -1, chosen))
    mask = known[:, None] & (rank < TOP)[None, :]
    ranked = tl.load(values + at[:, None] + rank[None, :], mask=mask, other=float("-inf"))
    left2 = tl.load(tokens + at[:, None] + rank[None, :], mask=mask, other=nobody)
    for place in tl.static_range(TOP):
        best = tl.max(ranked)
        chosen = tl.min(tl.where(ranked == best, left2, nobody))
        tl.store(top + output * TOP + place, tl.where(wrong, -1, chosen))
        taken = left2 == chosen
        ranked = tl.where(taken, float("-inf"), ranked)
        left2 = tl.where(taken, nobody, left2)

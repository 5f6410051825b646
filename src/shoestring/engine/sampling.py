"""A row's next token: penalty, temperature, top-k, top-p, min-p, and noise hashed from (seed, sample, position, token).

Sampling is the Gumbel-max trick: the arg-max of log-probability plus noise. The noise is a counter-based hash, so a
row's next token is a function of the row alone, whatever step computed it: that is what makes every decoding
strategy give the tokens of plain decoding. Filters follow transformers' order and meaning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shoestring.errors import RequestError

__all__ = [
    "SamplingOptions",
    "gumbel",
    "likely_draws",
    "next_token",
    "next_tokens",
    "noise",
    "noise_keys",
    "warp",
]

_PREFILTER = 256
_MASK32 = 0xFFFFFFFF
_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2 = map(
    np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_U27, _U30, _U31 = map(np.uint64, (27, 30, 31))


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is drawn; the defaults are greedy and unfiltered.

    Args:
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: divide (or, where negative, multiply) the logits of tokens seen before; 1 does nothing.
        seed: of the noise; any integer.
        sample: which of several samples of the same prompt and seed this is.

    Raises:
        RequestError: a value outside its range, or NaN.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        ranges: list[tuple[str, bool, str]] = [
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 does nothing)"),
        ]
        for name, valid, range_text in ranges:
            if not valid:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be {range_text}")

    @property
    def greedy(self) -> bool:
        """Whether no noise is drawn."""
        return self.temperature == 0

    @cached_property
    def noise_seed(self) -> int:
        """Seed and sample, mixed to 64 bits."""
        return _mix64(_mix64(self.seed) ^ self.sample)

    @property
    def filtered(self) -> bool:
        """Whether some tokens may be cut off before drawing."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def next_token(
    logits: Float[Tensor, " V"],
    options: SamplingOptions,
    position: int,
    seen: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> int:
    """The token that follows a row.

    Args:
        logits: the row's logits, in any float type.
        position: the next token's absolute position (the row's own plus one).
        seen: the sequence up to and including the row; read where there is a repetition penalty.
        allowed: mask [V] of the tokens that may follow, or None for all.

    Raises:
        RequestError: `allowed` allows nothing, or the logits are not finite numbers.
    """
    if allowed is not None or options.repetition_penalty != 1:
        logits = _constrain(logits.float(), options, seen, allowed)
    if options.greedy:
        # `max`, not `argmax`: vectorised on CPUs in every type; ties go to the first token in both.
        value, index = logits.max(dim=-1)
        if not math.isfinite(float(value)):
            raise RequestError(_not_finite(allowed))
        return int(index)
    if options.filtered and logits.shape[-1] > _PREFILTER:
        candidates = _prefiltered(logits, options, allowed)
        if candidates is not None:
            scores, tokens = candidates
            return int(tokens[(scores + noise(options, position, tokens)).argmax()])
    scores = warp(logits.float(), options)
    if not math.isfinite(float(scores.max())):
        raise RequestError(_not_finite(allowed))
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    return int((scores + noise(options, position, tokens)).argmax())


def next_tokens(
    logits: Float[Tensor, "R V"], options: SamplingOptions, positions: Sequence[int]
) -> list[int]:
    """`next_token` of many rows at once, without a penalty or a mask: for devices where every question costs a wait.

    Args:
        positions: each row's next token's absolute position.
    """
    if not options.filtered or logits.shape[-1] <= _PREFILTER:
        return [next_token(row, options, at) for row, at in zip(logits, positions, strict=True)]
    scores, tokens, known = _prefiltered_rows(logits, options)
    seeds = np.full(len(positions), options.noise_seed, np.uint64)
    keys = torch.from_numpy(noise_keys(seeds, np.asarray(positions)).view(np.int64)).to(logits.device)
    drawn = scores + gumbel(tokens, (keys & _MASK32)[:, None], (keys >> 32 & _MASK32)[:, None])
    chosen = tokens.gather(-1, drawn.argmax(dim=-1, keepdim=True)).squeeze(-1)
    found: list[int] = torch.where(known, chosen, -1).tolist()
    return [
        token if token >= 0 else next_token(logits[row], options, positions[row])
        for row, token in enumerate(found)
    ]


def likely_draws(
    logits: Float[Tensor, "R V"], options: SamplingOptions, positions: Sequence[int], count: int
) -> list[list[int]]:
    """Tokens likely to be drawn at each position from logits near these, best first: their noise is known already.

    Approximate on purpose (the likeliest 256 only, no penalty): for drafts.
    """
    values, tokens = logits.topk(min(_PREFILTER, logits.shape[-1]), dim=-1)
    keys = [_key(options, position) for position in positions]
    halves = torch.tensor([[key & _MASK32, key >> 32] for key in keys], device=logits.device)
    scores = warp(values.float(), options) + gumbel(tokens, halves[:, :1], halves[:, 1:])
    best = scores.topk(min(count, tokens.shape[-1]), dim=-1)
    drawn: list[list[int]] = (
        tokens.gather(-1, best.indices).masked_fill(best.values == -math.inf, -1).tolist()
    )
    return [[token for token in row if token >= 0] for row in drawn]


def warp(logits: Float[Tensor, "... V"], options: SamplingOptions) -> Float[Tensor, "... V"]:
    """Temperature and filters; what is cut off becomes -inf. The softmax is the distribution drawn from."""
    scores = logits / options.temperature if options.temperature > 0 else logits
    if options.top_k > 0 and options.top_k < scores.shape[-1]:
        least = scores.topk(options.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if options.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays while the mass of those before it has not reached top_p: the likeliest always does.
        cut = probabilities.cumsum(dim=-1) - probabilities >= options.top_p
        scores = scores.masked_fill(cut.scatter(-1, order, cut), -math.inf)
    if options.min_p > 0:
        least = scores.max(dim=-1, keepdim=True).values + math.log(options.min_p)
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def noise(options: SamplingOptions, position: int, tokens: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard Gumbel noise of each token at this position, the same on every device up to rounding.

    Two rounds of a 32-bit finaliser over (token, key), where the key mixes seed, sample and position.
    `log1p` of a 32-bit uniform keeps the upper tail exact in float32.
    """
    key = _key(options, position)
    return gumbel(tokens, key & _MASK32, key >> 32)


def noise_keys(seeds: Int[np.ndarray, " T"], positions: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
    """The noise's 64-bit key at each position, of each row's `SamplingOptions.noise_seed` (uint64).

    For kernels that hash it with the token themselves.
    """
    keys = (seeds ^ positions.astype(np.uint64)) + _GOLDEN
    keys = (keys ^ (keys >> _U30)) * _MULTIPLIER_1
    keys = (keys ^ (keys >> _U27)) * _MULTIPLIER_2
    return keys ^ (keys >> _U31)


def _key(options: SamplingOptions, position: int) -> int:
    return _mix64(options.noise_seed ^ position)


def gumbel(tokens: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """The noise of these tokens under a key's two halves of 32 bits."""
    bits = _mix32(tokens.long() ^ low)
    bits = _mix32(bits ^ high)
    uniform = ((bits.double() + 0.5) * 2.0**-32).float().clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _prefiltered(
    logits: Tensor, options: SamplingOptions, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The surviving tokens' scores and ids from the likeliest 256, or None where more may survive."""
    if options.top_k > _PREFILTER:
        return None
    tokens = logits.topk(_PREFILTER).indices.sort().values
    # Equal logits in token order, as `warp` sorts them (`topk` leaves ties in any order; bf16 has many).
    values, order = logits[tokens].sort(descending=True, stable=True)
    tokens = tokens[order]
    scores = values.float() / options.temperature
    if not math.isfinite(float(scores[0])):
        raise RequestError(_not_finite(allowed))
    if options.top_k == 0:
        total = torch.logsumexp(logits.float() / options.temperature, dim=-1)
        inside_min_p = options.min_p > 0 and float(scores[-1]) < float(scores[0]) + math.log(options.min_p)
        inside_top_p = options.top_p < 1 and float((scores - total).exp().sum()) >= options.top_p + 1e-4
        if not (inside_min_p or inside_top_p):
            return None
        if options.top_p < 1:
            probabilities = (scores - total).exp()
            cut = probabilities.cumsum(-1) - probabilities >= options.top_p
            if inside_top_p and not inside_min_p and float(scores[~cut][-1]) == float(scores[-1]):
                return None  # a tie at the edge reaches beyond what is in sight
            scores = scores.masked_fill(cut, -math.inf)
        if options.min_p > 0:
            scores = scores.masked_fill(scores < scores[0] + math.log(options.min_p), -math.inf)
    else:
        if float(scores[-1]) >= float(scores[options.top_k - 1]):
            return None  # a tie at the edge reaches beyond what is in sight
        scores = warp(
            scores,
            SamplingOptions(temperature=1, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p),
        )
    return scores, tokens


def _prefiltered_rows(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor, Tensor]:
    """`_prefiltered` of many rows: scores and tokens [R, 256], and for which rows they hold all that may survive."""
    tokens = logits.topk(_PREFILTER, dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(-1, tokens).sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(-1, order)
    scores = values.float() / options.temperature
    known = torch.isfinite(scores[:, 0])
    if options.top_k > 0:
        known &= options.top_k <= _PREFILTER
        known &= scores[:, -1] < scores[:, min(options.top_k, _PREFILTER) - 1]
        filters = SamplingOptions(
            temperature=1, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p
        )
        return warp(scores, filters), tokens, known
    total = torch.logsumexp(logits.float() / options.temperature, dim=-1, keepdim=True)
    least = scores[:, :1] + (math.log(options.min_p) if options.min_p > 0 else -math.inf)
    inside_min_p = scores[:, -1] < least[:, 0]
    inside_top_p = torch.zeros_like(inside_min_p)
    last = scores[:, -1]
    if options.top_p < 1:
        probabilities = (scores - total).exp()
        inside_top_p = probabilities.sum(dim=-1) >= options.top_p + 1e-4
        cut = probabilities.cumsum(dim=-1) - probabilities >= options.top_p
        scores = scores.masked_fill(cut, -math.inf)
        lowest = scores.masked_fill(cut, math.inf).min(dim=-1).values
        inside_top_p &= inside_min_p | (
            lowest != last
        )  # else a tie at the edge reaches beyond what is in sight
    known &= inside_min_p | inside_top_p
    return scores.masked_fill(scores < least, -math.inf), tokens, known


def _constrain(
    logits: Tensor, options: SamplingOptions, seen: Sequence[int], allowed: Tensor | None
) -> Tensor:
    if options.repetition_penalty != 1 and seen:
        index = torch.tensor(sorted(set(seen)), device=logits.device)
        values = logits[index]
        penalty = options.repetition_penalty
        logits = logits.index_copy(0, index, torch.where(values < 0, values * penalty, values / penalty))
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(logits.device), -math.inf)
    return logits


def _not_finite(allowed: Tensor | None) -> str:
    if allowed is not None and not bool(allowed.any()):
        return "the grammar allows no token here"
    return "the model's logits are not finite numbers (try dtype='float32')"


def _mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)

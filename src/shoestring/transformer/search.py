"""Greedy and beam search, batched, with the length penalty of arXiv 1609.08144, section 7.

The search stops as soon as nothing unfinished can still win, so stopping early never changes its result. No step
waits for the device, except for a look every few steps at whether all sentences are done.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoestring.transformer.decoder_state import CachedDecoder, PlainDecoder, Stepper
from shoestring.transformer.model import Transformer

__all__ = ["Hypothesis", "SearchOptions", "search"]

_LOOK_EVERY = 4
_NEVER = float("-inf")


@dataclass(frozen=True)
class SearchOptions:
    """`beam=1` is greedy. A translation has at most the source's tokens and `extra_length` more."""

    beam: int = 4
    length_penalty: float = 0.6
    extra_length: int = 50
    cached: bool = True


@dataclass(frozen=True)
class Hypothesis:
    """A translation's tokens (without the end's) and its score: log-probability over the length penalty."""

    tokens: list[int]
    score: float


@torch.no_grad()
def search(
    model: Transformer, source: Tensor, mask: Tensor | None, options: SearchOptions, best: int = 1
) -> list[list[Hypothesis]]:
    """The `best` highest hypotheses of each sentence, best first.

    `source` [B, S] with right padding that `mask` (True where a token is) hides; None where there is none.
    """
    assert 1 <= best <= options.beam, "no more results than the beam is wide"
    lengths = source.new_full((len(source),), source.shape[1]) if mask is None else mask.sum(1)
    limits = (lengths + options.extra_length).clamp(max=model.config.max_positions)
    longest = int(limits.max())
    stepper: Stepper
    if options.cached:
        stepper = CachedDecoder(model, source, mask, options.beam, longest)
    else:
        stepper = PlainDecoder(model, source, mask, options.beam)
    if options.beam == 1:
        return _greedy(model, stepper, limits, longest, _penalty(options.length_penalty))
    return _beam(model, stepper, limits, longest, options.beam, best, _penalty(options.length_penalty))


Penalty = Callable[[Tensor], Tensor]


def _penalty(alpha: float) -> Penalty:
    """Equation 14 of arXiv 1609.08144: ((5 + length) / 6) ^ alpha; the end counts as a token."""
    return lambda length: ((5 + length.float()) / 6) ** alpha


def _log_probabilities(model: Transformer, logits: Tensor) -> Tensor:
    """In fp32; padding and the start are no translations of anything."""
    logs = logits.float().log_softmax(-1)
    logs[..., [model.config.pad_token_id, model.config.bos_token_id]] = _NEVER
    return logs


def _greedy(
    model: Transformer, stepper: Stepper, limits: Tensor, longest: int, penalty: Penalty
) -> list[list[Hypothesis]]:
    count, eos, pad = len(limits), model.config.eos_token_id, model.config.pad_token_id
    tokens = torch.full((count, longest), pad, device=limits.device)
    newest = limits.new_full((count, 1), model.config.bos_token_id)
    finished = torch.zeros(count, dtype=torch.bool, device=limits.device)
    total = torch.zeros(count, device=limits.device, dtype=torch.float64)
    used = torch.zeros_like(limits)
    for at in range(longest):
        logs = _log_probabilities(model, stepper.step(newest)[:, 0])
        probability, newest = (found[:, None] for found in logs.max(-1))
        total += probability[:, 0].masked_fill(finished, 0)
        used += ~finished
        newest = newest.masked_fill(finished[:, None], pad)
        tokens[:, at] = newest[:, 0]
        finished = finished | (newest[:, 0] == eos) | (limits <= at + 1)
        if (at + 1) % _LOOK_EVERY == 0 and bool(finished.all()):
            break
    scores = (total / penalty(used)).tolist()
    return [
        [Hypothesis(_trimmed(row[:length], eos), score)]
        for row, length, score in zip(tokens.tolist(), used.tolist(), scores, strict=True)
    ]


def _beam(
    model: Transformer,
    stepper: Stepper,
    limits: Tensor,
    longest: int,
    width: int,
    best: int,
    penalty: Penalty,
) -> list[list[Hypothesis]]:
    config, device, count = model.config, limits.device, len(limits)
    eos, pad, vocabulary = config.eos_token_id, config.pad_token_id, config.vocab_size
    sentence = torch.arange(count, device=device)[:, None]
    alive = torch.full((count, width), _NEVER, device=device)  # log-probabilities
    alive[:, 0] = 0
    tokens = torch.full((count, width, longest), pad, device=device)
    newest = limits.new_full((count, width), config.bos_token_id)
    ended = torch.full((count, width), _NEVER, device=device)  # scores, best first
    ended_tokens = tokens.clone()
    done = torch.zeros(count, dtype=torch.bool, device=device)
    most = penalty(limits)
    for at in range(longest):
        logs = _log_probabilities(model, stepper.step(newest))
        totals = (alive[..., None] + logs).flatten(1)  # [B, K*V]
        # Every hypothesis has one end, so among the best 2K at least K go on.
        candidates, places = totals.topk(2 * width, dim=-1)
        parents, pieces = places // vocabulary, places % vocabulary
        ends = pieces == eos
        written = tokens[sentence, parents]  # [B, 2K, T]
        written[:, :, at] = pieces

        # At a sentence's last position everything ends, with the end's token or without.
        last = limits <= at + 1
        ending = (ends | last[:, None]) & ~done[:, None]
        scores = (candidates / penalty(limits.new_tensor(at + 1))).masked_fill(~ending, _NEVER)
        ended, order = torch.cat([ended, scores], dim=1).topk(width, dim=-1)
        ended_tokens = torch.cat([ended_tokens, written], dim=1)[sentence, order]

        alive, order = candidates.masked_fill(ends, _NEVER).topk(width, dim=-1)
        tokens, newest = written[sentence, order], pieces[sentence, order]
        stepper.reorder(parents[sentence, order])
        # A log-probability only falls, and no penalty divides it by more than the longest one's.
        done = done | last | (ended[:, best - 1] >= alive[:, 0] / most)
        if (at + 1) % _LOOK_EVERY == 0 and bool(done.all()):
            break
    return [
        [
            Hypothesis(_trimmed([t for t in row if t != pad], eos), score)
            for row, score in zip(rows, of_rows, strict=True)
            if score > _NEVER
        ]
        for rows, of_rows in zip(ended_tokens[:, :best].tolist(), ended[:, :best].tolist(), strict=True)
    ]


def _trimmed(tokens: list[int], eos: int) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == eos else tokens

"""Greedy and beam search, batched, with the length penalty of arXiv 1609.08144, section 7.

The search stops as soon as nothing unfinished can still win, so stopping early never changes its result. A step is a
function of tensors that it changes in place: on a GPU it is recorded once as a CUDA graph and replayed, and the host only
looks every few steps at whether all sentences are done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoestring.transformer.decoder_state import CachedDecoder, PlainDecoder, Stepper
from shoestring.transformer.model import Transformer
from shoestring.transformer.stepping import run_steps

__all__ = ["Hypothesis", "SearchOptions", "search"]

_NEVER = float("-inf")


@dataclass(frozen=True)
class SearchOptions:
    """`beam=1` is greedy. A translation has at most the source's tokens and `extra_length` more.

    `cached=False` and `graphs=False` are the plain twins: everything computed anew at each step, and no CUDA graphs.
    """

    beam: int = 4
    length_penalty: float = 0.6
    extra_length: int = 50
    cached: bool = True
    graphs: bool = True


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
    graphs = options.cached and options.graphs and source.device.type == "cuda"
    stepper: Stepper
    if options.cached:
        stepper = CachedDecoder(model, source, mask, options.beam, longest, exact=not graphs)
    else:
        stepper = PlainDecoder(model, source, mask, options.beam)
    kind = _Greedy if options.beam == 1 else _Beam
    state = kind(model, stepper, limits, longest, options, best)
    run_steps(state.step, state.done, longest, graphs=graphs)
    return state.results()


class _State:
    """What greedy and beam search share. `at` [1] is the position of the newest tokens."""

    def __init__(
        self,
        model: Transformer,
        stepper: Stepper,
        limits: Tensor,
        longest: int,
        options: SearchOptions,
        best: int,
    ) -> None:
        config, device = model.config, limits.device
        self.stepper, self.limits, self.width, self.best = stepper, limits, options.beam, best
        self.eos, self.pad, self.vocabulary = config.eos_token_id, config.pad_token_id, config.vocab_size
        self.alpha = options.length_penalty
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.newest = limits.new_full((len(limits), self.width), config.bos_token_id)
        self.tokens = torch.full((len(limits), self.width, longest), self.pad, device=device)
        self.done = torch.zeros(len(limits), dtype=torch.bool, device=device)
        # Padding and the start are no translations of anything.
        self._forbidden = torch.zeros(self.vocabulary, dtype=torch.bool, device=device)
        self._forbidden[[config.pad_token_id, config.bos_token_id]] = True

    def penalty(self, length: Tensor) -> Tensor:
        """Equation 14 of arXiv 1609.08144: ((5 + length) / 6) ^ alpha; the end counts as a token."""
        return ((5 + length.float()) / 6) ** self.alpha

    def log_probabilities(self, window: int) -> Tensor:
        """Of every next token, in fp32: [B, K, V]."""
        logits = self.stepper.step(self.newest, self.at, window)
        return logits.float().log_softmax(-1).masked_fill(self._forbidden, _NEVER)


class _Greedy(_State):
    """The likeliest token, again and again."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._total = torch.zeros(len(self.limits), device=self.limits.device, dtype=torch.float64)
        self._used = torch.zeros_like(self.limits)

    def step(self, window: int) -> None:
        """One more token for each sentence that is not done."""
        probability, newest = self.log_probabilities(window)[:, 0].max(-1)
        self._total += probability.masked_fill(self.done, 0)
        self._used += ~self.done
        newest = newest.masked_fill(self.done, self.pad)
        self.tokens.index_copy_(2, self.at, newest[:, None, None])
        self.newest.copy_(newest[:, None])
        self.at += 1
        self.done |= (newest == self.eos) | (self.limits <= self.at)

    def results(self) -> list[list[Hypothesis]]:
        """The sentences' texts."""
        scores = (self._total / self.penalty(self._used)).tolist()
        rows = zip(self.tokens[:, 0].tolist(), self._used.tolist(), scores, strict=True)
        return [[Hypothesis(_trimmed(row[:used], self.eos), score)] for row, used, score in rows]


class _Beam(_State):
    """The K likeliest beginnings, and the K best ended texts."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._alive = torch.full(self.newest.shape, _NEVER, device=self.at.device)  # log-probabilities
        self._alive[:, 0] = 0
        self._ended = torch.full_like(self._alive, _NEVER)  # scores, best first
        self._ended_tokens = self.tokens.clone()
        self._sentence = torch.arange(len(self.limits), device=self.at.device)[:, None]
        self._most = self.penalty(self.limits)

    def step(self, window: int) -> None:
        """One more token for each beginning."""
        totals = (self._alive[..., None] + self.log_probabilities(window)).flatten(1)  # [B, K*V]
        # Every beginning has one end, so among the best 2K at least K go on.
        candidates, places = totals.topk(2 * self.width, dim=-1)
        parents, pieces = places // self.vocabulary, places % self.vocabulary
        ends = pieces == self.eos
        written = self.tokens[self._sentence, parents]  # [B, 2K, T]
        written.index_copy_(2, self.at, pieces[..., None])

        # At a sentence's last position everything ends, with the end's token or without.
        length = self.at + 1
        last = self.limits <= length
        ending = (ends | last[:, None]) & ~self.done[:, None]
        scores = (candidates / self.penalty(length)).masked_fill(~ending, _NEVER)
        ended, order = torch.cat([self._ended, scores], dim=1).topk(self.width, dim=-1)
        self._ended_tokens.copy_(torch.cat([self._ended_tokens, written], dim=1)[self._sentence, order])
        self._ended.copy_(ended)

        alive, order = candidates.masked_fill(ends, _NEVER).topk(self.width, dim=-1)
        self._alive.copy_(alive)
        self.tokens.copy_(written[self._sentence, order])
        self.newest.copy_(pieces[self._sentence, order])
        self.stepper.reorder(parents[self._sentence, order], window)
        self.at += 1
        # A log-probability only falls, and no penalty divides it by more than the longest one's.
        self.done |= last | (ended[:, self.best - 1] >= alive[:, 0] / self._most)

    def results(self) -> list[list[Hypothesis]]:
        """The sentences' best texts."""
        texts, scores = self._ended_tokens[:, : self.best].tolist(), self._ended[:, : self.best].tolist()
        return [
            [
                Hypothesis(_trimmed([token for token in row if token != self.pad], self.eos), score)
                for row, score in zip(rows, of_rows, strict=True)
                if score > _NEVER
            ]
            for rows, of_rows in zip(texts, scores, strict=True)
        ]


def _trimmed(tokens: list[int], eos: int) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == eos else tokens

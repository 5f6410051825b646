"""The decoder one token at a time, for several hypotheses a sentence: with cached keys and values, and without.

Shapes: B sentences, K hypotheses of each, R = B*K rows. A sentence's hypotheses share the keys and values of its source:
they are queries of the same attention, so nothing of the source is copied or moved.
"""

from typing import Protocol

import torch
from torch import Tensor

from shoestring.transformer.model import DecoderLayer, Transformer

__all__ = ["CachedDecoder", "PlainDecoder", "Stepper"]


class Stepper(Protocol):
    """What the search needs of a decoder. Where a step stands is a tensor, so that a CUDA graph can hold the step."""

    def step(self, tokens: Tensor, at: Tensor, window: int) -> Tensor:
        """The logits [B, K, V] behind the newest tokens [B, K], which stand at position `at` [1] < `window`."""
        ...

    def reorder(self, parents: Tensor, window: int) -> None:
        """Hypothesis k of a sentence goes on from hypothesis `parents[b, k]`."""
        ...


class CachedDecoder:
    """Each step computes one position; the keys and values of earlier ones lie in buffers of `length` positions.

    With `exact` windows every position of a window is in use, and nothing is masked.
    """

    def __init__(
        self,
        model: Transformer,
        source: Tensor,
        mask: Tensor | None,
        hypotheses: int,
        length: int,
        exact: bool,
    ) -> None:
        config, decoder = model.config, model.decoder
        memory = model.encoder(source, mask).last_hidden_state
        assert memory is not None
        self._model, self._width, self._exact = model, hypotheses, exact
        self._mask = None if mask is None else mask[:, None, None, :]
        self._layers: list[DecoderLayer] = [
            layer for layer in decoder.layers if isinstance(layer, DecoderLayer)
        ]
        self._memory = [layer.cross.project_memory(memory) for layer in self._layers]
        rows, kind = len(source) * hypotheses, self._memory[0][0].dtype
        shape = (len(self._layers), rows, config.heads, length)
        self._keys = torch.zeros(*shape, config.d_k, device=source.device, dtype=kind)  # [L, R, H, S, D]
        self._values = torch.zeros(*shape, config.d_v, device=source.device, dtype=kind)
        self._places = torch.arange(length, device=source.device)
        self._first = torch.arange(len(source), device=source.device)[:, None] * hypotheses

    def step(self, tokens: Tensor, at: Tensor, window: int) -> Tensor:
        """See `Stepper`."""
        decoder = self._model.decoder
        table = decoder.positions.table.index_select(0, at)  # [1, E]
        x = decoder.embedding(tokens.reshape(-1, 1)) * decoder.scale + table  # [R, 1, E]
        seen = None if self._exact else (self._places[:window] <= at)[None, None, None]
        for index, layer in enumerate(self._layers):
            x = self._layer(index, layer, x, at, window, seen)
        return self._model.logits(decoder.norm(x)).view(*tokens.shape, -1)

    def reorder(self, parents: Tensor, window: int) -> None:
        """See `Stepper`."""
        rows = (self._first + parents).flatten()
        for buffer in (self._keys, self._values):
            buffer[:, :, :, :window] = buffer[:, :, :, :window].index_select(1, rows)

    def _layer(
        self, index: int, layer: DecoderLayer, x: Tensor, at: Tensor, window: int, seen: Tensor | None
    ) -> Tensor:
        width = self._width

        def itself(y: Tensor) -> Tensor:
            query, key, value = layer.attention.project(y)
            keys, values = self._keys[index], self._values[index]
            keys.index_copy_(2, at, key)
            values.index_copy_(2, at, value)
            return layer.attention.attend(query, keys[:, :, :window], values[:, :, :window], seen)

        def source(y: Tensor) -> Tensor:
            query = layer.cross.split(layer.cross.query(y.view(-1, width, y.shape[-1])))  # [B, H, K, D]
            return layer.cross.attend(query, *self._memory[index], self._mask).view(y.shape)

        x = layer.residuals[0](x, itself)
        x = layer.residuals[1](x, source)
        return layer.residuals[2](x, layer.feed_forward)


class PlainDecoder:
    """The plain twin: every step runs the whole decoder over all tokens so far."""

    def __init__(self, model: Transformer, source: Tensor, mask: Tensor | None, hypotheses: int) -> None:
        memory = model.encoder(source, mask).last_hidden_state
        assert memory is not None
        self._model = model
        self._memory = memory.repeat_interleave(hypotheses, dim=0)
        self._mask = None if mask is None else mask.repeat_interleave(hypotheses, dim=0)
        self._tokens: Tensor | None = None  # [B, K, T]

    def step(self, tokens: Tensor, at: Tensor, window: int) -> Tensor:
        """See `Stepper`."""
        newest = tokens[..., None].clone()
        self._tokens = newest if self._tokens is None else torch.cat([self._tokens, newest], dim=-1)
        hidden = self._model.decoder(self._tokens.flatten(0, 1), self._memory, self._mask)
        return self._model.logits(hidden[:, -1]).view(*tokens.shape, -1)

    def reorder(self, parents: Tensor, window: int) -> None:
        """See `Stepper`."""
        assert self._tokens is not None
        self._tokens = self._tokens.gather(1, parents[..., None].expand_as(self._tokens))

"""The encoder-decoder as an HF model: save, load and `generate` as any other (arXiv 1706.03762, figure 1)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncoderDecoderCache, GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from shoestring.transformer.config import TransformerConfig
from shoestring.transformer.layers import (
    Attention,
    Capture,
    FeedForward,
    PackedLinear,
    Positions,
    Residual,
    new_norm,
    sinusoids,
)

__all__ = ["Decoder", "DecoderLayer", "Encoder", "Transformer"]


class EncoderLayer(nn.Module):
    """Self-attention, then feedforward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config, cross=False), FeedForward(config)
        self.residuals = nn.ModuleList([Residual(config) for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor | None, capture: Capture = None) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        x = self.residuals[0](
            x, lambda y: self.attention.attend(*self.attention.project(y), mask, capture=capture)
        )
        return self.residuals[1](x, self.feed_forward)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the encoder's output, feedforward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention, self.cross = Attention(config, cross=False), Attention(config, cross=True)
        self.feed_forward = FeedForward(config)
        self.residuals = nn.ModuleList([Residual(config) for _ in range(3)])

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        captures: tuple[Capture, Capture] = (None, None),
        cache: EncoderDecoderCache | None = None,
        index: int = 0,
    ) -> Tensor:
        """[B, T, E] -> [B, T, E]; `cache` is HF's, for its own `generate`."""

        def itself(y: Tensor) -> Tensor:
            query, key, value = self.attention.project(y)
            causal = query.shape[2] > 1
            if cache is not None:
                key, value = cache.self_attention_cache.update(key, value, index)
            return self.attention.attend(query, key, value, causal=causal, capture=captures[0])

        def source(y: Tensor) -> Tensor:
            key: Any
            value: Any
            query = self.cross.split(self.cross.query(y))
            if cache is not None and cache.is_updated.get(index):
                layer: Any = cache.cross_attention_cache.layers[index]
                key, value = layer.keys, layer.values
            else:
                key, value = self.cross.project_memory(memory)
                if cache is not None:
                    key, value = cache.cross_attention_cache.update(key, value, index)
                    cache.is_updated[index] = True
            return self.cross.attend(query, key, value, mask, capture=captures[1])

        x = self.residuals[0](x, itself)
        x = self.residuals[1](x, source)
        return self.residuals[2](x, self.feed_forward)


class Encoder(nn.Module):
    """Embedded source tokens in, memory out."""

    main_input_name = "input_ids"

    def __init__(self, config: TransformerConfig, embedding: nn.Embedding, positions: Positions) -> None:
        super().__init__()
        self.embedding, self.positions = embedding, positions
        self.scale, self.dropout = math.sqrt(config.d_model), config.dropout
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.layers)])
        self.norm = new_norm(config) if config.norm == "pre" else nn.Identity()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, capture: Capture = None, **kwargs: Any
    ) -> BaseModelOutput:
        """[B, S] -> `last_hidden_state` [B, S, E]."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        x = self.embedding(input_ids) * self.scale + self.positions(0, input_ids.shape[1])
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, mask, capture)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class Decoder(nn.Module):
    """Target tokens and memory in, hidden states out."""

    def __init__(self, config: TransformerConfig, embedding: nn.Embedding, positions: Positions) -> None:
        super().__init__()
        self.embedding, self.positions = embedding, positions
        self.scale, self.dropout = math.sqrt(config.d_model), config.dropout
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.layers)])
        self.norm = new_norm(config) if config.norm == "pre" else nn.Identity()

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """[B, T] tokens that begin at position `start` -> [B, T, E]."""
        x = self.embedding(tokens) * self.scale + self.positions(start, tokens.shape[1])
        return F.dropout(x, self.dropout, self.training)

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        attention_mask: Tensor | None,
        captures: tuple[Capture, Capture] = (None, None),
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """[B, T] -> [B, T, E]."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        x = self.embed(tokens, 0 if cache is None else int(cache.get_seq_length()))
        for index, layer in enumerate(self.layers):
            x = layer(x, memory, mask, captures, cache, index)
        return self.norm(x)


class Transformer(PreTrainedModel, GenerationMixin):
    """The whole model. One matrix embeds source and target and, transposed, gives the logits (section 3.4)."""

    config_class = TransformerConfig
    config: TransformerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {f"{side}.embedding.weight": "shared.weight" for side in ("encoder", "decoder")}  # noqa: RUF012

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        source = Positions(config)
        # Learned positions are each side's own; the sinusoids are the same table.
        target = Positions(config) if source.learned else source
        self.encoder = Encoder(config, self.shared, source)
        self.decoder = Decoder(config, self.shared, target)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PackedLinear):
            for part in module.weight.split(module.widths):
                bound = math.sqrt(6 / sum(part.shape))  # Xavier, for each projection by itself
                initialization.uniform_(part, -bound, bound)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, std=self.config.d_model**-0.5)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            initialization.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                initialization.zeros_(module.bias)
        elif isinstance(module, Positions):
            if module.learned:
                initialization.normal_(module.table, std=self.config.d_model**-0.5)
            else:
                initialization.copy_(module.table, sinusoids(*module.table.shape))

    def get_input_embeddings(self) -> nn.Module:
        """The shared matrix."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the shared matrix everywhere."""
        assert isinstance(value, nn.Embedding)
        self.shared = self.encoder.embedding = self.decoder.embedding = value

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The encoder, as `generate` calls it."""
        return self.encoder

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return F.linear(hidden, self.shared.weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [B, T, V] and, with `labels` (-100 where none counts), the label-smoothed loss.

        The loss is the sum over the labels divided by `num_items_in_batch`, or their mean. Padding is on the right. In
        training only the loss is given: nothing else of a step's largest tensor is wanted.
        """
        captures: list[Capture] = [[] if output_attentions else None for _ in range(3)]
        if encoder_outputs is None:
            assert input_ids is not None, "input_ids or encoder_outputs"
            encoder_outputs = self.encoder(input_ids, attention_mask, captures[0])
        if decoder_input_ids is None:
            assert labels is not None, "decoder_input_ids or labels"
            decoder_input_ids = self.shifted(labels)
        memory: Any = encoder_outputs[0]
        hidden = self.decoder(
            decoder_input_ids, memory, attention_mask, (captures[1], captures[2]), past_key_values
        )
        logits = self.logits(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=-100,
                label_smoothing=self.config.label_smoothing,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        kept = [None if capture is None else tuple(capture) for capture in captures]
        return Seq2SeqLMOutput(
            loss=loss,
            logits=None if self.training and loss is not None else logits,
            past_key_values=past_key_values,
            encoder_last_hidden_state=memory,
            encoder_attentions=kept[0],
            decoder_attentions=kept[1],
            cross_attentions=kept[2],
        )

    def shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads to predict `labels`: the start token and all but the last."""
        start = labels.new_full((labels.shape[0], 1), self.config.bos_token_id)
        return torch.cat(
            [start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)], dim=1
        )

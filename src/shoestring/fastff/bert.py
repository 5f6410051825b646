"""UltraFastBERT as HF models: masked language model and classifier (arXiv 2311.10770, section 3; 2212.14034, section 4.2).

Pre-norm, no biases in linear layers (but the neurons' own), a norm of the embeddings and one at the end, tied embeddings
without a head transform. Shapes: B batch, T tokens, H heads, D head dimension, E hidden size, M masked.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput

from shoestring.fastff.bert_config import UltraFastBertConfig
from shoestring.fastff.dense import DenseFeedForward
from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.scattered import ScatteredFastFeedForward

__all__ = [
    "UltraFastBert",
    "UltraFastBertForMaskedLM",
    "UltraFastBertForSequenceClassification",
    "register",
]


class Embeddings(nn.Module):
    """Token vectors, positions unless they rotate, and a norm."""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.kind, self.dropout = config.positions, config.dropout
        shape = (config.max_positions, config.hidden_size)
        if self.kind == "learned":
            self.table = nn.Parameter(torch.empty(shape))
        elif self.kind == "sinusoidal":
            self.register_buffer("table", _sinusoids(*shape), persistent=False)
            self.scale = nn.Parameter(torch.empty(1))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, E]."""
        x = self.tokens(input_ids)
        if self.kind == "learned":
            x = x + self.table[: input_ids.shape[1]]
        elif self.kind == "sinusoidal":
            x = x + self.scale * self.table[: input_ids.shape[1]]
        return F.dropout(self.norm(x), self.dropout, self.training)


class Attention(nn.Module):
    """Self-attention in both directions."""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.packed = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, E] -> [B, T, E]; `mask` [B, 1, 1, T] is True where a key may be seen."""
        query, key, value = self.packed(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            query, key = _rotated(query, *rotation), _rotated(key, *rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then feedforward, each behind its norm."""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.feedforward: nn.Module = (
            DenseFeedForward(config.hidden_size, config.width, bias=config.feedforward_bias)
            if config.feedforward == "dense"
            else ScatteredFastFeedForward(
                config.hidden_size,
                config.depth,
                trees=config.trees,
                bias=config.feedforward_bias,
                method=config.feedforward_method,
            )
        )

    def forward(self, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        y = self.attention(self.attention_norm(x), mask, rotation)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.feedforward(self.feedforward_norm(x))
        return x + F.dropout(y, self.dropout, self.training)


class _PreTrained(PreTrainedModel):
    """What the models of this family share."""

    config_class = UltraFastBertConfig
    config: UltraFastBertConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Normal as crammed BERT; trees as UltraFastBERT, whose own initialisation is wider."""
        if isinstance(module, nn.Linear | nn.Embedding):
            initialization.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, FastFeedForward):
            into, out = 1 / math.sqrt(module.hidden_size), 1 / math.sqrt(module.active_neurons)
            initialization.uniform_(module.w_in, -into, into)
            initialization.uniform_(module.w_out, -out, out)
            if module.b_in is not None:
                initialization.uniform_(module.b_in, -into, into)
        elif isinstance(module, Embeddings):
            if module.kind == "learned":
                initialization.normal_(module.table, std=self.config.initializer_range)
            elif module.kind == "sinusoidal":
                initialization.constant_(module.scale, 1 / math.sqrt(self.config.hidden_size))
                initialization.copy_(module.table, _sinusoids(*module.table.shape))


class UltraFastBert(_PreTrained):
    """The encoder."""

    base_model_prefix = ""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config.check())
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token vectors."""
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token vectors."""
        assert isinstance(value, nn.Embedding)
        self.embeddings.tokens = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """[B, T] -> `last_hidden_state` [B, T, E]; padding may lie anywhere."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids)
        rotation = None
        if self.config.positions == "rotary":
            width = self.config.hidden_size // self.config.heads
            rotation = _rotation(input_ids.shape[1], width, x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, mask, rotation)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class UltraFastBertForMaskedLM(_PreTrained):
    """The encoder with its transposed token vectors as the head."""

    _tied_weights_keys = {"decoder.weight": "encoder.embeddings.tokens.weight"}  # noqa: RUF012

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.encoder = UltraFastBert(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        assert isinstance(value, nn.Linear)
        self.decoder = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, T, V], or [B, M, V] of `masked_positions` [B, M] alone; with `labels` of that shape the loss.

        Labels are -100 where none counts. The loss is their sum divided by `num_items_in_batch`, or their mean. In training
        only the loss is given: nothing else of a step's largest tensor is wanted.
        """
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        if masked_positions is not None:
            hidden = hidden.gather(1, masked_positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.decoder(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=-100,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        return MaskedLMOutput(loss=loss, logits=None if self.training and loss is not None else logits)


class UltraFastBertForSequenceClassification(_PreTrained):
    """The encoder, the mean over its tokens, a tanh layer, and a class."""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.encoder = UltraFastBert(config)
        self.pooled = nn.Linear(config.hidden_size, config.classifier_width)
        self.classifier = nn.Linear(config.classifier_width, int(config.num_labels or 2))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, classes]; with `labels` [B] the loss, summed over `num_items_in_batch` or their mean."""
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        if attention_mask is None:
            mean = hidden.mean(1)
        else:
            weight = attention_mask[..., None].to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1)
        x = F.dropout(torch.tanh(self.pooled(mean)), self.config.dropout, self.training)
        logits = self.classifier(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits.float(), labels, reduction="mean" if num_items_in_batch is None else "sum"
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        return SequenceClassifierOutput(loss=loss, logits=logits)


def register() -> None:
    """Let transformers' `AutoModel...` classes know this family; calling it again changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    AutoConfig.register(UltraFastBertConfig.model_type, UltraFastBertConfig, exist_ok=True)
    for auto, model in (
        (AutoModel, UltraFastBert),
        (AutoModelForMaskedLM, UltraFastBertForMaskedLM),
        (AutoModelForSequenceClassification, UltraFastBertForSequenceClassification),
    ):
        auto.register(UltraFastBertConfig, model, exist_ok=True)


def _sinusoids(positions: int, width: int) -> Tensor:
    """[positions, E]: sines of falling rates, then their cosines."""
    rates = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).float()


def _rotation(length: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D/2] of each position (arXiv 2104.09864)."""
    rates = 10000.0 ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each pair (first half, second half) of x [B, H, T, D] turned by its position's angle."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.to(x.dtype)

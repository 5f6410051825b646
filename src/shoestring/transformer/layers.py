"""Attention, feedforward, normalisation and positions (arXiv 1706.03762, section 3).

Shapes: B batch, T query positions, S key positions, H heads, D head dimension, E model width. Masks are boolean, True
where a query may look.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.transformer.config import TransformerConfig

__all__ = ["Attention", "FeedForward", "PackedLinear", "Positions", "Residual", "sinusoids"]

Capture = list[Tensor] | None


class PackedLinear(nn.Linear):
    """Several projections of the same input as one matrix product; each part is initialised for its own width."""

    def __init__(self, inputs: int, widths: tuple[int, ...], bias: bool) -> None:
        super().__init__(inputs, sum(widths), bias=bias)
        self.widths = widths

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The projections of `x`, one for each width."""
        return self(x).split(self.widths, dim=-1)


class Attention(nn.Module):
    """Multi-head attention (section 3.2.2), with `d_k` and `d_v` per head; no biases, as in the authors' code."""

    def __init__(self, config: TransformerConfig, *, cross: bool) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        keys, values = config.heads * config.d_k, config.heads * config.d_v
        if cross:
            self.query = PackedLinear(config.d_model, (keys,), bias=False)
            self.memory = PackedLinear(config.d_model, (keys, values), bias=False)
        else:
            self.packed = PackedLinear(config.d_model, (keys, keys, values), bias=False)
        self.output = PackedLinear(values, (config.d_model,), bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H*D] -> [B, H, T, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention, by head."""
        query, key, value = self.packed.parts(x)
        return self.split(query), self.split(key), self.split(value)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, by head."""
        key, value = self.memory.parts(memory)
        return self.split(key), self.split(value)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        capture: Capture = None,
    ) -> Tensor:
        """Scaled dot-product attention (equation 1) and the output projection: [B, T, E].

        With `capture`, the weights [B, H, T, S] are appended to it (and computed where they can be seen).
        """
        dropout = self.dropout if self.training else 0.0
        if capture is None:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)
        else:
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            if causal:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = scores.softmax(-1)
            capture.append(weights)
            mixed = F.dropout(weights, dropout) @ value
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear maps with ReLU between (equation 2), or a gated SiLU of two thirds the width (as many weights)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        width = max(8, round(config.d_ff * 2 / 3 / 8) * 8) if self.gated else config.d_ff
        self.inner = PackedLinear(
            config.d_model, (width, width) if self.gated else (width,), bias=not self.gated
        )
        self.outer = PackedLinear(width, (config.d_model,), bias=not self.gated)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        if not self.gated:
            return self.outer(F.relu(self.inner(x)))
        gate, up = self.inner.parts(x)
        return self.outer(F.silu(gate) * up)


class Residual(nn.Module):
    """A sub-layer's frame: LayerNorm(x + Dropout(f(x))) (section 3.1), or pre-norm: x + Dropout(f(Norm(x)))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = new_norm(config)
        self.pre = config.norm == "pre"
        self.dropout = config.dropout

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        if self.pre:
            return x + F.dropout(sublayer(self.norm(x)), self.dropout, self.training)
        return self.norm(x + F.dropout(sublayer(x), self.dropout, self.training))


def new_norm(config: TransformerConfig) -> nn.Module:
    """The normalisation that the configuration asks for."""
    return nn.RMSNorm(config.d_model, eps=1e-6) if config.norm_kind == "rms" else nn.LayerNorm(config.d_model)


class Positions(nn.Module):
    """What is added to the embeddings at each position (section 3.5): sinusoids, or learned vectors."""

    table: Tensor  # [max_positions, E]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.learned = config.positions == "learned"
        shape = (config.max_positions, config.d_model)
        if self.learned:
            self.table = nn.Parameter(torch.empty(shape))
        else:
            self.register_buffer("table", sinusoids(*shape), persistent=False)

    def forward(self, start: int, count: int) -> Tensor:
        """Those of `count` positions from `start` on: [count, E]."""
        return self.table[start : start + count]


def sinusoids(positions: int, width: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/E)) and PE(pos, 2i+1) = cos of the same: [positions, E]."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()

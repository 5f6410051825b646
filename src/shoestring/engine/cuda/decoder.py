"""A Llama-like decoder as a sequence of fused launches: what a CUDA graph of a step records.

Per layer: norm + QKV; head norms, rotary positions, cache writes and tree attention; output projection + residual; norm +
gate and up + activation; down projection + residual. Five or six launches where transformers' modules take about forty.
All of a step is in buffers that are allocated once: a run allocates nothing and never waits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from shoestring.engine.cuda.attention import AttentionPlan, Workspace, tree_attention
from shoestring.engine.cuda.cache_moves import move_rows
from shoestring.engine.cuda.choose import MAX_TOP, Candidates, choose
from shoestring.engine.cuda.layout import DeviceLayout, block_shape
from shoestring.engine.cuda.linear import gated_linear, linear
from shoestring.engine.cuda.products import LinearWorkspace, ScaledRows
from shoestring.engine.cuda.rotary import Turning, rotary_table
from shoestring.engine.cuda.rows import RowNorm, add_normed, embed, take_normed
from shoestring.engine.cuda.tuning import Tuning
from shoestring.engine.cuda.weights import DeviceWeight
from shoestring.engine.native_weights import NativeConfig

__all__ = ["Buffers", "Decoder", "LayerWeights"]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights on the device; the last two norms are Gemma's, behind the sub-layers."""

    attention_norm: RowNorm
    qkv: DeviceWeight
    qkv_bias: Tensor | None
    query_gain: Tensor | None
    key_gain: Tensor | None
    output: DeviceWeight
    output_bias: Tensor | None
    mlp_norm: RowNorm
    gate: DeviceWeight
    up: DeviceWeight
    down: DeviceWeight
    post_attention_norm: RowNorm | None = None
    post_mlp_norm: RowNorm | None = None


@dataclass(frozen=True)
class Buffers:
    """A step's numbers, for at most R rows and O outputs."""

    x: Float[Tensor, "R E"]
    """The residual stream, float32."""
    own: Float[Tensor, "R E"]
    """Embeddings that rows bring, float32, in any order."""
    packed: Float[Tensor, "R (H+2K)D"]
    attended: Float[Tensor, "R H D"]
    gated: Float[Tensor, "R F"]
    added: Float[Tensor, "R E"]
    """A sub-layer's output before its norm, float32 (Gemma)."""
    final: Float[Tensor, "O E"]
    logits: Float[Tensor, "O V"]
    """float32."""
    chosen: Int32[Tensor, " N"]
    """O next tokens, then [O, k] likeliest ones."""

    @classmethod
    def allocate(
        cls, config: NativeConfig, rows: int, outputs: int, dtype: torch.dtype, device: torch.device
    ) -> "Buffers":
        """Zeroed buffers."""
        heads, kv_heads, dim = config.num_heads, config.num_key_value_heads, config.head_dim

        def make(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        wide = torch.float32
        return cls(
            x=make(rows, config.hidden_size, kind=wide),
            own=make(rows, config.hidden_size, kind=wide),
            packed=make(rows, (heads + 2 * kv_heads) * dim),
            attended=make(rows, heads, dim),
            gated=make(rows, config.intermediate_size),
            added=make(rows, config.hidden_size, kind=wide),
            final=make(outputs, config.hidden_size),
            logits=make(outputs, config.vocab_size, kind=wide),
            chosen=make(outputs * (1 + MAX_TOP), kind=torch.int32),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)


class Decoder:
    """The model: weights, rotary tables and the launches of a step.

    Args:
        config: as numbers (`engine/native_weights.py`).
        embedding: [V, E] in the computing type.
        head: the output matrix; its bias [V] or None.
        dtype: what matrices, keys and values are in: bfloat16, float16 or float32.
        positions: how many positions the rotary tables reach.
    """

    def __init__(
        self,
        config: NativeConfig,
        embedding: Tensor,
        layers: Sequence[LayerWeights],
        norm: RowNorm,
        head: DeviceWeight,
        head_bias: Tensor | None,
        dtype: torch.dtype,
        positions: int,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, embedding.device
        self.embedding, self.layers, self.norm = embedding, tuple(layers), norm
        self.head, self.head_bias = head, head_bias
        self.tuning = Tuning.of_machine(self.device)
        """How products are launched; what has been captured keeps to what it was."""
        width = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        self._workspace = LinearWorkspace.allocate(self.device, width=width)
        tables = [
            rotary_table(torch.tensor(frequencies, device=self.device), positions, scaling)
            for frequencies, scaling in config.ropes
        ]
        if -1 in config.layer_ropes:  # layers without positions turn by nothing
            still = torch.zeros(positions, config.head_dim, device=self.device)
            still[:, : config.head_dim // 2] = 1
            tables.append(still)
        self._turnings = [
            Turning(tables[rope], layer.query_gain, layer.key_gain, config.norm_epsilon, config.norm_adds_one)
            for rope, layer in zip(config.layer_ropes, self.layers, strict=True)
        ]
        self.processors = (
            torch.cuda.get_device_properties(self.device).multi_processor_count
            if self.device.type == "cuda"
            else 4
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that a step reads."""
        matrices = [self.head]
        for layer in self.layers:
            matrices += [layer.qkv, layer.output, layer.gate, layer.up, layer.down]
        return sum(matrix.nbytes for matrix in matrices)

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """The shape of a cache block."""
        return block_shape(len(self.layers), self.config.num_key_value_heads, self.config.head_dim)

    def plan(self, slots: int, rows: int) -> AttentionPlan:
        """How a bucket's attention is cut."""
        config = self.config
        return AttentionPlan.choose(
            slots,
            rows,
            config.num_heads,
            config.num_key_value_heads,
            config.head_dim,
            self.dtype,
            processors=self.processors,
        )

    def buffers(self, rows: int, outputs: int) -> Buffers:
        """Buffers for so many rows."""
        return Buffers.allocate(self.config, rows, outputs, self.dtype, self.device)

    def run(
        self,
        layout: DeviceLayout,
        table: Tensor,
        plan: AttentionPlan,
        workspace: Workspace,
        buffers: Buffers,
        candidates: Candidates,
        hidden: Mapping[int, Tensor] | None = None,
    ) -> None:
        """One step of the bucket's rows; `buffers.chosen` and `.logits` hold the outputs.

        Args:
            candidates: room to choose next tokens in.
            hidden: layer -> [R, E], which receive hidden states (0: embeddings; L: behind the last norm).
        """
        config, dtype = self.config, self.dtype
        rows, outputs = layout.bucket.rows, layout.bucket.rows
        x = buffers.x[:rows]
        packed, attended = buffers.packed[:rows], buffers.attended[:rows]
        gated, added = buffers.gated[:rows], buffers.added[:rows]
        cache: dict[str, Any] = {"cache_dtype": dtype}
        pdl = self.device.type == "cuda" and self.tuning.pdl
        shared: dict[str, Any] = {"workspace": self._workspace, "tuning": self.tuning}
        hidden = hidden or {}
        move_rows(
            table,
            layout,
            layers=len(self.layers),
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            **cache,
        )
        embed(layout, self.embedding, buffers.own, x, config.embedding_scale)
        scaled: ScaledRows | None = None  # what the product in front left for the norm behind it
        next_norms = [*(layer.attention_norm for layer in self.layers[1:]), None]
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            if index in hidden:
                hidden[index].copy_(x)
            linear(
                x, layer.qkv, packed, norm=layer.attention_norm, scaled=scaled, bias=layer.qkv_bias, **shared
            )
            tree_attention(
                packed,
                self._turnings[index],
                table,
                index,
                layout,
                plan,
                workspace,
                attended,
                scale=config.attention_scale,
                window=config.windows[index],
                softcap=config.attention_softcap,
                pdl=pdl,
                **cache,
            )
            flat = attended.flatten(1)
            if layer.post_attention_norm is None:
                scaled = linear(
                    flat,
                    layer.output,
                    x,
                    bias=layer.output_bias,
                    residual=x,
                    next_norm=layer.mlp_norm,
                    **shared,
                )
            else:
                scaled = None
                linear(flat, layer.output, added, bias=layer.output_bias, **shared)
                add_normed(layout, added, layer.post_attention_norm, x, pdl)
            gated_linear(
                x, layer.gate, layer.up, gated, norm=layer.mlp_norm, scaled=scaled, activation=config.activation,
                **shared,
            )  # fmt: skip
            if layer.post_mlp_norm is None:
                scaled = linear(gated, layer.down, x, residual=x, next_norm=next_norm, **shared)
            else:
                scaled = None
                linear(gated, layer.down, added, **shared)
                add_normed(layout, added, layer.post_mlp_norm, x, pdl)
        if len(self.layers) in hidden:
            hidden[len(self.layers)].copy_(self.norm(x))
        final, logits = buffers.final[:outputs], buffers.logits[:outputs]
        take_normed(layout, x, self.norm, final, pdl)
        linear(final, self.head, logits, bias=self.head_bias, **shared)
        if config.logit_softcap:
            logits.div_(config.logit_softcap).tanh_().mul_(config.logit_softcap)
        top_k = candidates.values.shape[2] - 1
        drawn = buffers.chosen[:outputs]
        top = buffers.chosen[outputs : outputs * (1 + top_k)].view(outputs, top_k)
        choose(logits, layout, candidates, drawn, top)

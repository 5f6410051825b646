"""A paper-style model as HF's MarianMT, weight by weight: it runs where Marian models run, and is checked against one."""

from typing import Any

import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel

from shoestring.errors import UnsupportedModelError
from shoestring.transformer.config import TransformerConfig
from shoestring.transformer.model import Transformer

__all__ = ["as_marian"]


@torch.no_grad()
def as_marian(model: Transformer) -> MarianMTModel:
    """The same function as a MarianMT model (its attention biases are zero).

    Raises:
        UnsupportedModelError: the model is not of the paper's style, or its heads have a width of their own.
    """
    config: TransformerConfig = model.config
    style = (config.norm, config.norm_kind, config.activation, config.positions)
    if style != ("post", "layer", "relu", "sinusoidal") or {config.d_k, config.d_v} != {
        config.d_model // config.heads
    }:
        raise UnsupportedModelError(
            f"MarianMT is the paper's form; this model has {', '.join(style)}, d_k {config.d_k}, d_v {config.d_v}"
        )
    marian: Any = MarianMTModel(_config(config))
    marian = marian.to(device=model.device, dtype=model.dtype).eval()
    weights = {
        name: torch.zeros_like(weight)
        for name, weight in marian.state_dict().items()
        if name.endswith("bias")
    }
    weights["model.shared.weight"] = weights["lm_head.weight"] = model.shared.weight
    for side, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        weights[f"model.{side}.embed_tokens.weight"] = model.shared.weight
        weights[f"model.{side}.embed_positions.weight"] = part.positions.table
        for index, layer in enumerate(part.layers):
            weights |= _layer(f"model.{side}.layers.{index}", layer, config)
    marian.load_state_dict(weights)
    return marian


def _config(config: TransformerConfig) -> MarianConfig:
    both: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", config.layers),
            ("attention_heads", config.heads),
            ("ffn_dim", config.d_ff),
        )
    }
    return MarianConfig(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        **both,
        activation_function="relu",
        scale_embedding=True,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=0.0,
        max_position_embeddings=config.max_positions,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.bos_token_id,
        forced_eos_token_id=None,
    )


def _layer(name: str, layer: torch.nn.Module, config: TransformerConfig) -> dict[str, Tensor]:
    found = layer.state_dict()
    query, key, value = found["attention.packed.weight"].chunk(3)
    weights = {
        f"{name}.self_attn.q_proj.weight": query,
        f"{name}.self_attn.k_proj.weight": key,
        f"{name}.self_attn.v_proj.weight": value,
        f"{name}.self_attn.out_proj.weight": found["attention.output.weight"],
    }
    norms = ["self_attn_layer_norm", "final_layer_norm"]
    if "cross.query.weight" in found:
        key, value = found["cross.memory.weight"].chunk(2)
        weights |= {
            f"{name}.encoder_attn.q_proj.weight": found["cross.query.weight"],
            f"{name}.encoder_attn.k_proj.weight": key,
            f"{name}.encoder_attn.v_proj.weight": value,
            f"{name}.encoder_attn.out_proj.weight": found["cross.output.weight"],
        }
        norms.insert(1, "encoder_attn_layer_norm")
    for ours, theirs in (("inner", "fc1"), ("outer", "fc2")):
        for kind in ("weight", "bias"):
            weights[f"{name}.{theirs}.{kind}"] = found[f"feed_forward.{ours}.{kind}"]
    for index, norm in enumerate(norms):
        for kind in ("weight", "bias"):
            weights[f"{name}.{norm}.{kind}"] = found[f"residuals.{index}.norm.{kind}"]
    return weights

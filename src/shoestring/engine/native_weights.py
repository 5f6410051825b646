"""What the native step needs to know of a model: its configuration as numbers, and its weights where they lie.

`why_not` reads an HF configuration and says what the native step cannot do; `config_of` and `tensors_of` turn an HF
module into a `NativeConfig` and named `WeightMatrix`es.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.errors import UnsupportedModelError
from shoestring.quantization import WeightMatrix, WeightType, pack, weight_type_for

__all__ = ["NativeConfig", "as_native", "config_of", "named_weights", "tensors_of", "why_not"]

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ONE_CENTRED_NORMS = {"gemma", "gemma2", "gemma3_text"}
_KINDS = {"llama", "mistral", "qwen2", "qwen3", "smollm3", *_ONE_CENTRED_NORMS}


@dataclass(frozen=True, kw_only=True)
class NativeConfig:
    """A Llama-like decoder as numbers.

    Args:
        windows: per layer, how many positions back a row sees (itself included); 0 is all.
        ropes: rotary tables: (inverse frequencies [D/2] in float32, what cosines and sines are multiplied by).
        layer_ropes: per layer, which of `ropes` turns its queries and keys; -1: none.
        norm_adds_one: whether norms multiply by 1 + weight (Gemma).
        adjacent_pairs: whether rotary pairs are dimensions (2i, 2i + 1), as in GGUF's permuted Llama weights, and
            not (i, i + D/2), as in transformers.
        bf16_cache: whether keys and values are kept in bfloat16 rather than float32.
        max_positions: the most positions that the model can be right on; None where nothing limits them.
    """

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_epsilon: float
    windows: tuple[int, ...]
    ropes: tuple[tuple[np.ndarray, float], ...]
    layer_ropes: tuple[int, ...]
    attention_scale: float
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"
    norm_adds_one: bool = False
    adjacent_pairs: bool = False
    bf16_cache: bool = True
    max_positions: int | None = None


def why_not(config: Any) -> str | None:
    """What of an HF text configuration the native step cannot do; None where it can do all."""
    kind = config.model_type
    if kind not in _KINDS:
        return f"the native step does not know {kind} models (it runs {', '.join(sorted(_KINDS))})"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in _ACTIVATIONS:
        return f"the native step has no activation {activation!r}"
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if types - {"full_attention", "sliding_attention"}:
        return f"the native step has no layers of type {', '.join(sorted(types))}"
    if getattr(config, "use_bidirectional_attention", False):
        return "the native step has no bidirectional attention"
    dim = _head_dim(config)
    if dim % 8 or not 8 <= dim <= 512:
        return f"the native step's heads are multiples of 8 wide, at most 512, not {dim}"
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type", "default") not in {
            "default",
            "linear",
            "llama3",
            "yarn",
            "proportional",
        }:
            return f"the native step has no rotary scaling {parameters['rope_type']!r}"
        if parameters.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            return "the native step rotates all of a head, not a part"
    return None


def config_of(
    model: torch.nn.Module, max_positions: int | None, dtype: torch.dtype | None = None
) -> NativeConfig:
    """The configuration of an HF module, whose parameters may be on the meta device.

    `dtype`: what it computes in, where that is not its embedding's type.

    Raises:
        UnsupportedModelError: with what `why_not` says.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    reason = why_not(config)
    if reason is not None:
        raise UnsupportedModelError(reason)
    kind, dim = config.model_type, _head_dim(config)
    body = _body(model)
    layers = range(config.num_hidden_layers)
    windows = tuple(_window(layer.self_attn) for layer in body.layers)
    ropes, layer_ropes = _ropes(body.rotary_emb, config)
    uses_rope = getattr(config, "no_rope_layers", None)
    if uses_rope:
        layer_ropes = tuple(rope if uses_rope[i] else -1 for i, rope in zip(layers, layer_ropes, strict=True))
    scale = getattr(config, "query_pre_attn_scalar", None) if kind in {"gemma2", "gemma3_text"} else None
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedding_scale = getattr(embedding, "embed_scale", None)
    dtype = dtype or embedding.weight.dtype
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return NativeConfig(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        windows=windows,
        ropes=ropes,
        layer_ropes=layer_ropes,
        attention_scale=float(scale or dim) ** -0.5,
        attention_softcap=float(getattr(config, "attn_logit_softcapping", None) or 0),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0),
        # Rounded as the module rounds it.
        embedding_scale=1.0 if embedding_scale is None else float(torch.as_tensor(embedding_scale).to(dtype)),
        activation=_ACTIVATIONS[activation],
        norm_adds_one=kind in _ONE_CENTRED_NORMS,
        bf16_cache=dtype != torch.float32,
        max_positions=max_positions,
    )


def tensors_of(model: torch.nn.Module, quantize: str | None = None) -> dict[str, WeightMatrix]:
    """The weights of a loaded HF module: float32 as they lie, others packed in bfloat16, or all as `quantize` says.

    Raises:
        UnsupportedModelError: a weight that is not a plain float tensor on the CPU (quantised modules, other devices).
    """
    return {name: _matrix(name, weight, quantize) for name, weight in named_weights(model).items()}


def named_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """An HF module's weights by their names below the decoder, and the head's where it is not the embedding."""
    body = _body(model)
    weights = {name: parameter.detach() for name, parameter in body.named_parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight is not body.embed_tokens.weight:
        weights["lm_head.weight"] = head.weight.detach()
    if getattr(head, "bias", None) is not None:
        weights["lm_head.bias"] = head.bias.detach()
    return weights


def as_native(
    config: NativeConfig, tensors: Mapping[str, WeightMatrix]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two dictionaries that the native model is made from."""
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "max_positions"}
    fields["ropes"] = [
        (np.ascontiguousarray(frequencies, np.float32), scaling) for frequencies, scaling in config.ropes
    ]
    fields["windows"], fields["layer_ropes"] = list(config.windows), list(config.layer_ropes)
    matrices = {name: (int(m.type), m.rows, m.cols, m.data) for name, m in tensors.items()}
    return fields, matrices


def _body(model: torch.nn.Module) -> Any:
    """The decoder: layers, embedding, final norm."""
    body: Any = model.base_model
    return getattr(body, "language_model", body)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _window(attention: Any) -> int:
    window = getattr(attention, "sliding_window", None)
    if window is None and getattr(attention.config, "model_type", "") == "mistral":
        window = attention.config.sliding_window
    return int(window or 0)


def _ropes(rotary: Any, config: Any) -> tuple[tuple[tuple[np.ndarray, float], ...], tuple[int, ...]]:
    layers = config.num_hidden_layers
    if hasattr(rotary, "inv_freq"):
        table = (rotary.inv_freq.float().cpu().numpy(), float(rotary.attention_scaling))
        return (table,), (0,) * layers
    kinds = sorted(set(config.layer_types))
    tables = tuple(
        (
            getattr(rotary, f"{kind}_inv_freq").float().cpu().numpy(),
            float(getattr(rotary, f"{kind}_attention_scaling")),
        )
        for kind in kinds
    )
    return tables, tuple(kinds.index(kind) for kind in config.layer_types)


def _matrix(name: str, weight: Tensor, quantize: str | None) -> WeightMatrix:
    if weight.device.type != "cpu" or not weight.is_floating_point() or type(weight.data) is not Tensor:
        raise UnsupportedModelError(
            f"the native step runs plain float weights on the CPU; {name} is {weight.dtype} on {weight.device}"
        )
    if quantize is None and weight.dtype == torch.float32:
        return pack(weight, WeightType.F32)
    return pack(weight, weight_type_for(name, tuple(weight.shape), quantize))

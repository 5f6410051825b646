"""From a loaded HF module to the fused step: weights joined where one matrix serves several projections, or packed."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from shoestring.engine import admission
from shoestring.engine.cuda.decoder import Decoder, LayerWeights
from shoestring.engine.cuda.rows import RowNorm
from shoestring.engine.cuda.runner import UNLIMITED, CudaRunner
from shoestring.engine.cuda.weights import DeviceWeight, join_weights, pack_weight, weight_of_tiles
from shoestring.engine.native_weights import NativeConfig, config_of, named_weights
from shoestring.engine.runner import Outputs
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import UnsupportedModelError
from shoestring.quantization import WeightMatrix, WeightType

__all__ = ["runner_of_module"]

_HEAD_DIMS = range(16, 257)
_TILES = MappingProxyType({WeightType.INT8_TILES: "int8", WeightType.INT4_TILES: "int4"})
_PROBE_SLOT = -3
_PROBE_TOKENS = 12
# Relative error of the fused step's logits against the module's own.
# Rounded weights change logits by what rounding costs; those of a wrong kernel have nothing to do with the module's.
_UNRELATED = 0.95
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}


def runner_of_module(
    module: torch.nn.Module,
    *,
    quantize: str | None = None,
    packed: Mapping[str, WeightMatrix] | None = None,
    graphs: bool = True,
    probe: bool = True,
) -> CudaRunner:
    """A runner with the weights of a loaded HF module.

    Without `quantize` the module stays usable: its projections become views of the joined matrices. With it, matrices are
    packed one by one and the module's own are let go as it is. `packed` are the matrices of a quantised folder, by their
    names below the decoder: those are taken as they are, and the module has the numbers that they stand for.

    Raises:
        UnsupportedModelError: the fused step cannot run this model, or disagrees with the module on a few tokens.
    """
    config = config_of(module, admission.max_positions(module))
    reason = why_not(config, module)
    if reason is not None:
        raise UnsupportedModelError(reason)
    positions = config.max_positions or UNLIMITED
    expected = _module_logits(module, config) if probe else None
    runner = CudaRunner(
        _decoder(module, config, quantize, positions, packed or {}),
        max_positions=config.max_positions,
        weights=_stored(packed) or quantize or str(_dtype(module)).removeprefix("torch."),
        parameters=sum(weight.numel() for weight in named_weights(module).values()),
        graphs=graphs,
    )
    if expected is not None:
        _check(runner, _probe_tokens(config), expected, loose=bool(quantize or packed))
    return runner


def why_not(config: NativeConfig, module: torch.nn.Module) -> str | None:
    """What of a model the fused step cannot do; None where it can do all."""
    if _dtype(module) not in _TOLERANCE:
        return f"the fused step computes in float32, bfloat16 or float16, not {_dtype(module)}"
    if config.head_dim not in _HEAD_DIMS:
        return f"the fused step's heads are 16 to 256 wide, not {config.head_dim}"
    if config.num_heads % config.num_key_value_heads:
        return f"{config.num_heads} heads do not share {config.num_key_value_heads} key-value heads evenly"
    names = named_weights(module)
    biased = [name for name in names if name.endswith("bias") and ".mlp." in name]
    return f"the fused step has no bias in a feedforward ({biased[0]})" if biased else None


def _dtype(module: torch.nn.Module) -> torch.dtype:
    dtype: torch.dtype = module.get_input_embeddings().weight.dtype  # type: ignore[operator]
    return dtype


def _stored(packed: Mapping[str, WeightMatrix] | None) -> str | None:
    """How most of the packed matrices are stored, for people."""
    kinds = Counter(matrix.type for matrix in (packed or {}).values() if matrix.type in _TILES)
    return _TILES[kinds.most_common(1)[0][0]] if kinds else None


def _decoder(
    module: torch.nn.Module,
    config: NativeConfig,
    quantize: str | None,
    positions: int,
    packed: Mapping[str, WeightMatrix],
) -> Decoder:
    weights = named_weights(module)
    parameters = _named_parameters(module)
    dtype = _dtype(module)

    def norm(name: str) -> RowNorm | None:
        gain = weights.get(name)
        return None if gain is None else RowNorm(gain, config.norm_epsilon, config.norm_adds_one)

    def given(name: str) -> DeviceWeight | None:
        found = packed.get(name)
        if found is None or found.type not in _TILES:
            return None
        return weight_of_tiles(found, weights["embed_tokens.weight"].device, dtype)

    def matrix(name: str) -> DeviceWeight:
        return given(name) or pack_weight(weights[name], quantize)

    def joined(names: list[str]) -> DeviceWeight:
        parts = [given(name) for name in names]
        if all(parts):
            return join_weights([part for part in parts if part is not None])
        together = torch.cat([weights[name] for name in names])
        if quantize is None:
            first = 0
            for name in names:  # one copy: the module reads it too
                count = len(weights[name])
                parameters[name].data = together[first : first + count]
                first += count
        return pack_weight(together, quantize)

    def joined_bias(names: list[str]) -> Tensor | None:
        found = [weights[name] for name in names if name in weights]
        return torch.cat(found) if found else None

    layers = []
    for index in range(len(config.windows)):
        at = f"layers.{index}."
        qkv = [f"{at}self_attn.{kind}_proj" for kind in "qkv"]
        four = f"{at}pre_feedforward_layernorm.weight" in weights
        attention_norm = norm(f"{at}input_layernorm.weight")
        mlp_norm = norm(f"{at}{'pre_feedforward' if four else 'post_attention'}_layernorm.weight")
        if attention_norm is None or mlp_norm is None:
            raise UnsupportedModelError(f"layer {index} has no norm before a sub-layer")
        layers.append(
            LayerWeights(
                attention_norm=attention_norm,
                qkv=joined([f"{name}.weight" for name in qkv]),
                qkv_bias=joined_bias([f"{name}.bias" for name in qkv]),
                query_gain=weights.get(f"{at}self_attn.q_norm.weight"),
                key_gain=weights.get(f"{at}self_attn.k_norm.weight"),
                output=matrix(f"{at}self_attn.o_proj.weight"),
                output_bias=weights.get(f"{at}self_attn.o_proj.bias"),
                mlp_norm=mlp_norm,
                gate=matrix(f"{at}mlp.gate_proj.weight"),
                up=matrix(f"{at}mlp.up_proj.weight"),
                down=matrix(f"{at}mlp.down_proj.weight"),
                post_attention_norm=norm(f"{at}post_attention_layernorm.weight") if four else None,
                post_mlp_norm=norm(f"{at}post_feedforward_layernorm.weight") if four else None,
            )
        )
    final = norm("norm.weight")
    if final is None:
        raise UnsupportedModelError("the model has no last norm")
    embedding = weights["embed_tokens.weight"]
    head = weights.get("lm_head.weight", embedding)
    # A model is most sensitive to its head, so it is int8 at least.
    named = "lm_head.weight" if "lm_head.weight" in weights else "embed_tokens.weight"
    packed_head = given(named) or pack_weight(head, quantize and "int8")
    return Decoder(
        config, embedding, layers, final, packed_head, weights.get("lm_head.bias"), dtype, positions
    )


def _named_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    body: Any = module.base_model
    return dict(getattr(body, "language_model", body).named_parameters())


def _probe_tokens(config: NativeConfig) -> list[int]:
    return [
        (37 * index + 11) % config.vocab_size
        for index in range(min(_PROBE_TOKENS, config.max_positions or 99))
    ]


def _module_logits(module: torch.nn.Module, config: NativeConfig) -> Tensor:
    tokens = torch.tensor([_probe_tokens(config)], device=next(module.parameters()).device)
    attention: str = admission.text_config(module)._attn_implementation
    if config.attention_softcap:  # SDPA leaves it out
        admission.switch_attention(module, "eager")
    try:
        with torch.inference_mode():
            logits: Tensor = module(input_ids=tokens, use_cache=False).logits[0]
    finally:
        if config.attention_softcap:
            admission.switch_attention(module, attention)
    return logits.float()


def _check(runner: CudaRunner, tokens: list[int], expected: Tensor, *, loose: bool) -> None:
    """Compare the fused step with the module on a chain of tokens; rounded weights are only held to be near."""
    runner.open(_PROBE_SLOT, SamplingOptions())
    try:
        found = runner.step({_PROBE_SLOT: TokenTree.chain(tokens)}, Outputs(logits=True))[_PROBE_SLOT]
        logits = torch.stack([found.logits(row) for row in range(len(tokens))]).float()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(f"the fused step failed here: {reason}") from error
    finally:
        runner.release(_PROBE_SLOT)
        runner.clear()
    error_ = float((logits - expected).norm() / expected.norm())
    if not error_ <= (_UNRELATED if loose else _TOLERANCE[runner.dtype]):
        raise UnsupportedModelError(f"the fused step differs from the module on this model (by {error_:.1g})")

"""Tiny random models (fp32, a few layers of width 64) of every architecture the engine runs, and of those it refuses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 199
SLIDING_WINDOW = 8
CONTEXT = 512

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXTURE: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Architecture:
    """How a tiny model is built: transformers' class names and the configuration beside `_COMMON`."""

    config: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    common: bool = True
    scale: float = 0.16
    reason: str = ""
    """What the refusal must say; empty for an architecture that runs."""

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has the class."""
        return hasattr(transformers, self.model) and hasattr(transformers, self.config)

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """A model with the same weights for the same seed."""
        options = {**(_COMMON if self.common else {}), **self.options, **changes}
        # A list would be filled in by the configuration it is given to.
        options = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        config = getattr(transformers, self.config)(**options)
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config).eval()
        _scale_up(model, self.scale, seed)
        model.generation_config.eos_token_id = None
        return model


def _scale_up(model: torch.nn.Module, scale: float, seed: int) -> None:
    """Weights large enough that attention is peaked and logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                spread = 1.0 if "embed" in name or "wte" in name or "wpe" in name else scale
                parameter.normal_(0, spread, generator=generator)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            else:
                parameter.normal_(0, 0.3, generator=generator)


def _layers(*kinds: str) -> list[str]:
    return [f"{kind}_attention" for kind in kinds]


ADMITTED: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM"),
    "mistral": Architecture("MistralConfig", "MistralForCausalLM", {"sliding_window": SLIDING_WINDOW}),
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2-sliding": Architecture(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _layers("full", "sliding"),
        },
    ),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 24}),
    "gemma": Architecture("GemmaConfig", "GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": Architecture(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
        },
        scale=0.3,
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 3,
            "layer_types": _layers("sliding", "full", "sliding"),
        },
    ),
    "gemma3n": Architecture(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": _layers("sliding", "full", "sliding", "full"),
            "sliding_window": SLIDING_WINDOW,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [96] * 4,
        },
    ),
    "gemma4": Architecture(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": _layers("sliding", "full", "sliding", "full"),
            "sliding_window": SLIDING_WINDOW,
        },
    ),
    "phi": Architecture("PhiConfig", "PhiForCausalLM", {"partial_rotary_factor": 0.5}, scale=0.4),
    "phi3": Architecture("Phi3Config", "Phi3ForCausalLM", {"sliding_window": SLIDING_WINDOW}),
    "phimoe": Architecture(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": SLIDING_WINDOW},
    ),
    "gpt2": Architecture(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
        common=False,
    ),
    "gpt-bigcode": Architecture(
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
        common=False,
    ),
    "gpt-j": Architecture(
        "GPTJConfig",
        "GPTJForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "rotary_dim": 8,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
        common=False,
    ),
    "gpt-neox": Architecture("GPTNeoXConfig", "GPTNeoXForCausalLM", scale=0.4),
    "opt": Architecture(
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": 64,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
        common=False,
    ),
    "gpt-oss": Architecture(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": SLIDING_WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _layers("sliding", "full"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "mixtral": Architecture(
        "MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "stablelm": Architecture("StableLmConfig", "StableLmForCausalLM"),
    "cohere": Architecture("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.5}),
    "cohere2": Architecture(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {"logit_scale": 0.5, "sliding_window": SLIDING_WINDOW, "layer_types": _layers("sliding", "full")},
    ),
    "olmo": Architecture("OlmoConfig", "OlmoForCausalLM"),
    "olmo2": Architecture("Olmo2Config", "Olmo2ForCausalLM"),
    "olmo3": Architecture(
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {"sliding_window": SLIDING_WINDOW, "layer_types": _layers("sliding", "full")},
    ),
    "falcon-rope": Architecture(
        "FalconConfig",
        "FalconForCausalLM",
        {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "starcoder2": Architecture(
        "Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": SLIDING_WINDOW}
    ),
    "granite": Architecture("GraniteConfig", "GraniteForCausalLM"),
    "smollm3": Architecture("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "deepseek-v3": Architecture(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "exaone4": Architecture(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {"sliding_window": SLIDING_WINDOW, "layer_types": _layers("sliding", "full")},
    ),
    "glm4": Architecture("Glm4Config", "Glm4ForCausalLM", {"head_dim": 16}, scale=0.3),
    "qwen2-moe": Architecture(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_MIXTURE, "shared_expert_intermediate_size": 32}
    ),
    "qwen3-moe": Architecture("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MIXTURE, "head_dim": 16}),
    "diffllama": Architecture("DiffLlamaConfig", "DiffLlamaForCausalLM", {"head_dim": 16}),
    "nemotron": Architecture("NemotronConfig", "NemotronForCausalLM"),
    "ernie4.5": Architecture("Ernie4_5Config", "Ernie4_5ForCausalLM", {"head_dim": 16}),
    "llama4": Architecture(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "head_dim": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0],
            "moe_layers": [1],
            "attention_chunk_size": 16,
            "layer_types": _layers("chunked", "full"),
        },
    ),
}
"""Architectures on which every strategy must give the tokens of transformers' own `generate`."""

_RECURRENT, _CONVOLUTIONAL, _ALIBI = "recurrent", "convolutional", "ALiBi"
REFUSED: Mapping[str, Architecture] = {
    "falcon": Architecture("FalconConfig", "FalconForCausalLM", {"alibi": True}, reason=_ALIBI),
    "bloom": Architecture(
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        common=False,
        reason=_ALIBI,
    ),
    "mpt": Architecture(
        "MptConfig",
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4},
        common=False,
        reason=_ALIBI,
    ),
    "gpt_neo": Architecture(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        common=False,
        reason="key indices",
    ),
    "lfm2": Architecture(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"]},
        reason=_CONVOLUTIONAL,
    ),
    "jamba": Architecture(
        "JambaConfig",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        reason=_RECURRENT,
    ),
    "falcon_h1": Architecture(
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
        },
        reason=_RECURRENT,
    ),
    "qwen3_next": Architecture(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **_MIXTURE,
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        reason=_RECURRENT,
    ),
    "qwen3_5_text": Architecture(
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        reason=_RECURRENT,
    ),
    "mamba": Architecture(
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        common=False,
        reason=_RECURRENT,
    ),
}
"""Architectures that would be silently wrong, by their `model_type`."""

"""Which models the engine can be right on: by name, by layer types, and by a probe that compares a tree with plain passes.

A model whose state or position bias the engine cannot see would be silently wrong, so what is not proven is refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.engine.attention import ATTENTION_NAME, StepLayout, active_step, additive_mask
from shoestring.engine.kvcache import KVCache, LayerShapeRecorder, PlaneShape
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import UnsupportedModelError

__all__ = [
    "check_architecture",
    "computes_own_attention",
    "max_positions",
    "probe",
    "switch_attention",
    "text_config",
]

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# Attention that a model computes itself is right under a mask of ours only if that mask is all there is to it.
_OWN_ATTENTION = {"eager", "sdpa"}
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
_REFUSED = {
    "bloom": "its ALiBi bias is computed from key indices",
    "mpt": "its ALiBi bias is computed from key indices",
    "gpt_neo": "its local windows are computed from key indices",
    "mamba": "it has recurrent state",
    "mamba2": "it has recurrent state",
    "falcon_mamba": "it has recurrent state",
    "rwkv": "it has recurrent state",
    "recurrent_gemma": "it has recurrent state",
    "jamba": "it has recurrent state",
    "bamba": "it has recurrent state",
    "zamba": "it has recurrent state",
    "zamba2": "it has recurrent state",
    "falcon_h1": "it has recurrent state",
    "granitemoehybrid": "it has recurrent state",
    "nemotron_h": "it has recurrent state",
    "xlstm": "it has recurrent state",
    "lfm2": "it has convolutional state",
    "lfm2_moe": "it has convolutional state",
    "qwen3_next": "it has recurrent state",
    "qwen3_5": "it has recurrent state",
    "qwen3_5_text": "it has recurrent state",
    "qwen3_5_moe": "it has recurrent state",
    "minimax": "it has recurrent state",
    "kimi_linear": "it has recurrent state",
}
# The probe's tree: two branches, one of which forks, behind five cached tokens.
_PROBE_PARENTS = (-1, 0, 1, 0, 3, 3)
_PROBE_CACHED = 5
# Relative error of a right model: <= 1.4e-6 in fp32; of a wrong one: >= 9e-3. Low precision rounds each layer.
_TOLERANCE = {torch.float32: 5e-4, torch.float64: 5e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def text_config(model: torch.nn.Module) -> Any:
    """The configuration of the text tower."""
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def computes_own_attention(model: torch.nn.Module) -> bool:
    """Whether transformers cannot switch the model's attention (Falcon, GPT-J): it then runs under a ready-made mask."""
    return not model._can_set_attn_implementation()  # type: ignore[operator]


def check_architecture(model: torch.nn.Module) -> None:
    """Refuse what is known to be silently wrong.

    Raises:
        UnsupportedModelError: with the architecture's name and the reason.
    """
    config = text_config(model)
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; the engine runs causal language models")
    reason = _REFUSED.get(kind)
    if kind == "falcon" and getattr(config, "alibi", False):
        reason = "its ALiBi bias is computed from key indices"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if reason is None and layer_types - _LAYER_TYPES:
        reason = f"it has layers of type {', '.join(sorted(layer_types - _LAYER_TYPES))}"
    if reason is None and computes_own_attention(model):
        if config._attn_implementation not in _OWN_ATTENTION:
            reason = f"its own {config._attn_implementation} attention takes no mask of ours"
        elif any(getattr(config, window, None) for window in _WINDOWS):
            reason = "its attention cannot be switched and has windows"
    if reason is not None:
        raise UnsupportedModelError(
            f"{kind} models cannot be run over token trees: {reason}; transformers' own generate() runs them"
        )


def max_positions(model: torch.nn.Module) -> int | None:
    """The most positions the model can be right on, draft depth included."""
    config = text_config(model)
    limit: int | None = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in {"dynamic", "longrope"}:
            # These look at the step's largest position: stay where the original frequencies hold.
            original = parameters.get("original_max_position_embeddings") or limit
            limit = min(limit, original) if limit and original else limit or original
    if config.model_type == "llama4_text":
        floor = int(getattr(config, "floor_scale", 8192))
        limit = min(limit, floor) if limit else floor
    return int(limit) if limit else None


@torch.inference_mode()
def probe(model: torch.nn.Module, attention: str) -> dict[tuple[int, str], PlaneShape]:
    """Compare a branching tree with plain passes; return the layers' cache shapes.

    `attention` is the implementation that the plain passes use (eager, where scores are soft-capped).
    The model is left on tree attention.

    Raises:
        UnsupportedModelError: the attention could not be switched, or the tree gives other logits.
    """
    kind = text_config(model).model_type
    vocabulary = int(text_config(model).vocab_size)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    tokens = [(7 + 13 * i) % max(vocabulary - 1, 1) for i in range(_PROBE_CACHED + len(_PROBE_PARENTS))]
    cached, rows = tokens[:_PROBE_CACHED], tokens[_PROBE_CACHED:]
    tree = TokenTree(rows, _PROBE_PARENTS)
    own_attention = computes_own_attention(model)
    if not own_attention:
        # SDPA leaves soft caps out, and older transformers take it by default all the same.
        capped = getattr(text_config(model), "attn_logit_softcapping", None) is not None
        switch_attention(model, "eager" if capped else attention)
    leaves = [row for row in range(len(tree)) if not tree.children[row]]
    plain = []
    for leaf in leaves:
        sequence = [*cached, *(rows[row] for row in tree.path(leaf))]
        plain.append(_logits(model, torch.tensor([sequence], device=device), use_cache=False)[0, -1])
    if not own_attention:
        switch_attention(model, ATTENTION_NAME)
    recorder = LayerShapeRecorder()
    try:
        _forward_tree(model, recorder, {0: TokenTree.chain(cached)}, {0: 0}, device)
        if not recorder.planes:
            raise UnsupportedModelError(f"{kind} models do not use the cache they are given")
        cache = KVCache(recorder.planes)
        cache.open(0, cached)
        for part in (TokenTree.chain(cached), tree):
            cache.reserve(0, len(part))
            logits = _forward_tree(model, cache, {0: part}, {0: cache.length(0)}, device)
            cache.commit(0, part.tokens, range(len(part)))
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{kind} models cannot be run over token trees: {type(error).__name__}: {error}"
        ) from error
    worst = _relative_error(logits[0, leaves], plain)
    if not worst <= _TOLERANCE.get(logits.dtype, 6e-2):
        raise UnsupportedModelError(
            f"{kind} models cannot be run over token trees: a branching step differs from plain passes by "
            f"{worst:.1e}; transformers' own generate() runs them"
        )
    return recorder.planes


def switch_attention(model: torch.nn.Module, name: str) -> None:
    """Set the text tower's attention implementation.

    Raises:
        UnsupportedModelError: the model ignores it.
    """
    config = text_config(model)
    if config is model.config:
        model.set_attn_implementation(name)  # type: ignore[operator]
    else:
        model.set_attn_implementation({"text_config": name})  # type: ignore[operator]
    if config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{config.model_type} models do not let their attention be switched to {name!r}"
        )


def _logits(model: torch.nn.Module, input_ids: Tensor, **arguments: Any) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, return_dict=True, **arguments).logits
    return logits


def _forward_tree(
    model: torch.nn.Module,
    cache: Any,
    trees: dict[int, TokenTree],
    cached: dict[int, int],
    device: torch.device,
) -> Tensor:
    layout = StepLayout.pack(trees, cached, device)
    input_ids = torch.tensor([[token for tree in trees.values() for token in tree.tokens]], device=device)
    arguments: dict[str, Any] = {}
    if computes_own_attention(model):
        arguments["attention_mask"] = additive_mask(layout, model.dtype)  # type: ignore[arg-type]
    with active_step(layout):
        return _logits(
            model,
            input_ids,
            position_ids=layout.positions,
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )


def _relative_error(tree_logits: Tensor, plain: Sequence[Tensor]) -> float:
    worst = 0.0
    for ours, theirs in zip(tree_logits.float(), plain, strict=True):
        theirs = theirs.float().to(ours.device)
        error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
        worst = max(worst, float(error)) if bool(torch.isfinite(error)) else float("inf")
    return worst

"""gpt-fast (github.com/pytorch-labs/gpt-fast) as a contender: its own model and loop, from the reader's clone of it.

It runs as its `generate.py --compile --compile_prefill` does, one prompt at a time. Its cache is as wide as the widest text
from the beginning, so that it compiles once, and it is told how long a text becomes, since it never looks for an end.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

__all__ = ["GptFast"]


class GptFast:
    """A Hugging Face Llama's weights in gpt-fast's model.

    Args:
        folder: a clone of gpt-fast; its `generate.py` is imported and run.
        module: the Llama, on its device.
        width: tokens of the widest text.
        compiled: False runs it as it is, to try things out.
    """

    def __init__(self, folder: Path, module: Any, width: int, compiled: bool = True) -> None:
        before = torch._inductor.config.coordinate_descent_tuning
        self._code = _imported(folder)
        # Importing it has set this for the whole process; other contenders compile without.
        torch._inductor.config.coordinate_descent_tuning = before
        self._model = _model_of(module, self._code.Transformer, sys.modules["model"].ModelArgs)
        self._device = module.device
        with torch.device(self._device):
            self._model.setup_caches(max_batch_size=1, max_seq_length=width)
        if compiled:
            self._code.decode_one_token = torch.compile(
                self._code.decode_one_token, mode="reduce-overhead", fullgraph=True
            )
            self._code.prefill = torch.compile(self._code.prefill, fullgraph=True, dynamic=True)

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """So many tokens, greedily."""
        encoded = torch.tensor(prompt, dtype=torch.int, device=self._device)
        with torch._inductor.config.patch(coordinate_descent_tuning=True):
            text, _ = self._code.generate(
                self._model, encoded, tokens, 1, interactive=False, draft_model=None, temperature=0.0
            )
        return [int(token) for token in text[0, len(prompt) :].tolist()]


def _imported(folder: Path) -> Any:
    if not (folder / "generate.py").is_file():
        raise SystemExit(f"{folder} is no clone of gpt-fast: it has no generate.py")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("generate")
    finally:
        sys.path.remove(str(folder))


def _model_of(module: Any, kind: Any, arguments: Any) -> Any:
    config = module.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    with torch.device("meta"):
        model = kind(
            arguments(
                block_size=config.max_position_embeddings,
                vocab_size=config.vocab_size,
                n_layer=config.num_hidden_layers,
                n_head=heads,
                dim=config.hidden_size,
                intermediate_size=config.intermediate_size,
                n_local_heads=kv_heads,
                rope_base=config.rope_parameters["rope_theta"],
                norm_eps=config.rms_norm_eps,
            )
        )
    weights = {
        "tok_embeddings.weight": module.model.embed_tokens.weight,
        "norm.weight": module.model.norm.weight,
        "output.weight": module.lm_head.weight,
    }
    for index, layer in enumerate(module.model.layers):
        attention, feedforward = layer.self_attn, layer.mlp
        query = _beside(attention.q_proj.weight, heads)
        key = _beside(attention.k_proj.weight, kv_heads)
        weights |= {
            f"layers.{index}.attention.wqkv.weight": torch.cat([query, key, attention.v_proj.weight]),
            f"layers.{index}.attention.wo.weight": attention.o_proj.weight,
            f"layers.{index}.feed_forward.w1.weight": feedforward.gate_proj.weight,
            f"layers.{index}.feed_forward.w3.weight": feedforward.up_proj.weight,
            f"layers.{index}.feed_forward.w2.weight": feedforward.down_proj.weight,
            f"layers.{index}.attention_norm.weight": layer.input_layernorm.weight,
            f"layers.{index}.ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
    model.load_state_dict({name: weight.detach() for name, weight in weights.items()}, assign=True)
    return model.eval()


def _beside(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection with the two numbers of a rotary pair side by side, as gpt-fast turns them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

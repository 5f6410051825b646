"""What the probe refuses, and that a model is left as it was."""

import pytest
import torch
from architectures import _COMMON, ADMITTED, CONTEXT
from comparing import plain_model, prompt_of
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.engine.admission import max_positions
from shoestring.engine.attention import ATTENTION_NAME
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.runner import Outputs
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError, UnsupportedModelError


class IgnoresPositions(LlamaForCausalLM):
    """Counts its rows instead of reading their positions."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(start, start + input_ids.shape[1])[None]
        return super().forward(
            input_ids=input_ids, position_ids=positions, past_key_values=past_key_values, **kwargs
        )


class IgnoresTheCache(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(input_ids=input_ids, use_cache=False, **kwargs)


class SelectsNoRows(LlamaForCausalLM):
    """Computes every row's logits, as older models do."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        return super().forward(
            input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
        )


def build(kind):
    torch.manual_seed(0)
    return kind(LlamaConfig(**_COMMON)).eval()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (IgnoresPositions, "a branching step differs from plain passes by"),
        (IgnoresTheCache, "do not use the cache"),
    ],
)
def test_a_model_that_would_be_silently_wrong_is_refused_and_left_as_it_was(kind, reason):
    model = build(kind)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=f"llama models .*{reason}"):
        HFRunner(model)
    assert model.config._attn_implementation == before != ATTENTION_NAME


def test_a_model_without_row_selection_gives_the_rows_asked_for():
    model = build(SelectsNoRows)
    tokens = prompt_of(7)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    runner = HFRunner(model)
    runner.open(0, SamplingOptions())
    runner.step({0: TokenTree.chain(tokens[:3])}, Outputs({0: []}))
    runner.commit({0: range(3)})
    rows = runner.step({0: TokenTree.chain(tokens[3:])}, Outputs({0: [1, 3]}))[0]
    assert [rows.has(row) for row in range(4)] == [False, True, False, True]
    torch.testing.assert_close(torch.stack([rows.logits(1), rows.logits(3)]), expected[[4, 6]])


@pytest.mark.parametrize("name", ["falcon-rope", "gpt-j"])
@pytest.mark.parametrize("option", ["sliding_window", "attention_chunk_size"])
def test_attention_that_cannot_be_switched_must_have_no_windows(name, option):
    model = ADMITTED[name].build()
    setattr(model.config, option, 8)
    with pytest.raises(UnsupportedModelError, match="cannot be switched and has windows"):
        HFRunner(model)


def test_attention_that_cannot_be_switched_must_take_a_mask():
    model = ADMITTED["falcon-rope"].build()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="its own flash_attention_2 attention takes no mask"):
        HFRunner(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss", "falcon-rope"])
def test_while_the_runner_holds_it_the_model_computes_as_it_did(name):
    if not ADMITTED[name].exists:
        pytest.skip("not in this version of transformers")
    model = ADMITTED[name].build()
    if name == "gemma2":
        model.set_attn_implementation("eager")
    runner = HFRunner(model)
    batch = torch.tensor([prompt_of(20), prompt_of(20, seed=4)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    with torch.no_grad():
        for arguments in ({"input_ids": batch}, {"input_ids": batch, "attention_mask": mask}):
            ours, plain = (m(**arguments).logits for m in (model, plain_model(name)))
            seen = arguments.get("attention_mask", torch.ones_like(batch)).bool()
            torch.testing.assert_close(ours[seen], plain[seen], atol=1e-4, rtol=1e-4)
    runner.close()


@pytest.mark.skipif(not ADMITTED["gemma2"].exists, reason="not in this version of transformers")
def test_soft_caps_are_kept_though_the_model_came_with_an_attention_that_drops_them():
    model = ADMITTED["gemma2"].build()
    if model.config._attn_implementation != "sdpa":
        pytest.skip("this version of transformers no longer takes SDPA for it")
    runner = HFRunner(model)
    tokens = prompt_of(9)
    runner.open(0, SamplingOptions())
    rows = runner.step({0: TokenTree.chain(tokens)}, Outputs(logits=True))[0]
    with torch.no_grad():
        expected = plain_model("gemma2")(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(rows.logits(8), expected[8], atol=1e-4, rtol=1e-4)
    runner.close()
    assert model.config._attn_implementation == "sdpa"


def test_closing_gives_the_attention_back_and_ends_decoding():
    model = ADMITTED["llama"].build()
    before = model.config._attn_implementation
    runner = HFRunner(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    runner.close()
    assert model.config._attn_implementation == before
    with pytest.raises(RequestError, match="was closed"):
        runner.open(0, SamplingOptions())


def test_rotary_scaling_that_looks_at_the_largest_position_limits_the_context():
    assert max_positions(ADMITTED["llama"].build()) == CONTEXT
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = ADMITTED["llama"].build(max_position_embeddings=256, rope_parameters=scaled)
    assert max_positions(model) == 256
    scaled = {**scaled, "rope_type": "longrope", "original_max_position_embeddings": 64}
    scaled |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = ADMITTED["phi3"].build(
        max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=scaled
    )
    assert max_positions(model) == 64

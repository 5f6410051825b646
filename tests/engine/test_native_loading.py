"""The native step over files where they lie: GGUF tensors, float32 safetensors, packed weights, against HF's modules."""

import gguf
import numpy as np
import pytest
import torch
from folders import write_gguf, write_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import shoestring
from shoestring import hub
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.runner import Outputs
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import ModelFileError, RequestError, UnsupportedModelError
from shoestring.model import LanguageModel

pytest.importorskip("shoestring._native", reason="built without the native part")

TOKENS = [(7 * i + 3) % 250 for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def log_probabilities(model):
    return np.array(model.score(TOKENS).logprobs)


def plain(folder, **config):
    """transformers' own module, without any of ours."""
    return LanguageModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config))


def test_float_gguf_equals_its_conversion(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    model = shoestring.load(str(path))
    assert isinstance(model.runner, NativeRunner)
    assert not (cache / "converted").exists()
    converted = plain(hub.resolve(path, dtype="float32"))
    np.testing.assert_allclose(log_probabilities(model), log_probabilities(converted), atol=2e-5)
    for decoding in ("autoregressive", "lookahead(window=4,ngram=3,guesses=4)", "auto(budget=6)"):
        ours = model.generate(TOKENS, decoding=decoding, max_new_tokens=24)
        assert (
            ours.token_ids
            == converted.generate(TOKENS, decoding="autoregressive", max_new_tokens=24).token_ids
        )


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "F16", "BF16", "IQ4_NL"])
def test_quantised_gguf_is_near_its_expanded_weights(tmp_path, kind):
    path = write_gguf(tmp_path / "tiny.gguf", kind=kind)
    model = shoestring.load(str(path))
    stored = {"F16": "float16", "BF16": "bfloat16", "IQ4_NL": "bfloat16"}.get(kind, kind.lower())
    assert model.runner.weights == stored
    expanded = plain(hub.resolve(path, dtype="float32"))
    ours, theirs = log_probabilities(model), log_probabilities(expanded)
    # What int8 activations and bfloat16 keys cost; a wrong nibble order costs a hundred times more.
    assert np.abs(ours - theirs).mean() < 0.02
    plain_tokens = model.generate(TOKENS, decoding="autoregressive", max_new_tokens=32).token_ids
    for decoding in ("lookahead(window=4,ngram=3,guesses=4)", "auto(budget=12)"):
        assert model.generate(TOKENS, decoding=decoding, max_new_tokens=32).token_ids == plain_tokens


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("qwen2", {"biases": True}),
        ("qwen3", {"head_norms": True}),
        ("smollm3", {}),
        ("gemma", {}),
        ("gemma3", {"gemma": True}),
    ],
)
def test_architectures_equal_their_conversion(tmp_path, architecture, extra):
    path = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, **extra)
    model = shoestring.load(str(path))
    assert isinstance(model.runner, NativeRunner)
    try:
        folder = hub.resolve(path, dtype="float32")
    except ModelFileError as error:
        pytest.skip(f"transformers does not convert it: {error}")
    # transformers always takes the published Gemmas' 256 here.
    changes = {"query_pre_attn_scalar": 16} if architecture == "gemma3" else {}
    reference = plain(folder, **changes)
    np.testing.assert_allclose(log_probabilities(model), log_probabilities(reference), atol=5e-5)


def test_split_gguf(tmp_path):
    whole = shoestring.load(str(write_gguf(tmp_path / "whole.gguf")))
    parts = write_gguf(tmp_path / "split.gguf", split_max_tensors=7)
    assert len(list(tmp_path.glob("split-*.gguf"))) > 2
    np.testing.assert_array_equal(log_probabilities(shoestring.load(str(parts))), log_probabilities(whole))
    with pytest.raises(ModelFileError, match="one part of a split GGUF, which cannot be converted"):
        shoestring.load(str(parts), dtype="float32")
    sorted(tmp_path.glob("split-*.gguf"))[1].unlink()
    with pytest.raises(ModelFileError, match=r"split-00002-of-\d+\.gguf is not beside it"):
        shoestring.load(str(parts))


def test_missing_and_misshapen_tensors(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", drop="blk.1.ffn_up.weight")
    with pytest.raises(ModelFileError, match=r"lacks the tensor 'layers\.1\.mlp\.up_proj\.weight'"):
        shoestring.load(str(path))
    odd = {"blk.1.ffn_up.weight": np.zeros((100, 64), np.float32)}
    path = write_gguf(tmp_path / "odd.gguf", drop="blk.1.ffn_up.weight", arrays=odd)
    with pytest.raises(
        ModelFileError, match=r"up_proj\.weight' has the shape \[100, 64\], and the model's is"
    ):
        shoestring.load(str(path))


def test_folder_runs_without_a_module(tmp_path, cache):
    folder = write_llama(tmp_path / "llama")
    model = shoestring.load(str(folder), dtype="float32")
    assert isinstance(model.runner, NativeRunner)
    assert model._module is None
    reference = plain(folder)
    np.testing.assert_allclose(log_probabilities(model), log_probabilities(reference), atol=1e-5)
    assert isinstance(model.model, LlamaForCausalLM)  # made when asked for
    assert not (cache / "packed").exists()  # float32 weights are mapped as they lie


@pytest.mark.parametrize(
    ("options", "bound"),
    [({"dtype": "bfloat16"}, 0.01), ({"quantize": "int8"}, 0.02), ({"quantize": "int4"}, 0.3)],
)
def test_packed_folder_is_near(tmp_path, cache, options, bound):
    folder = write_llama(tmp_path / "llama", shard_size="100KB")
    stages = []
    model = shoestring.load(str(folder), **options, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"pack"}
    stages.clear()
    again = shoestring.load(str(folder), **options, progress=lambda stage, *_: stages.append(stage))
    assert stages == []
    ours = log_probabilities(model)
    np.testing.assert_array_equal(ours, log_probabilities(again))
    assert np.abs(ours - log_probabilities(plain(folder))).mean() < bound


def test_changed_weights_are_packed_anew(tmp_path):
    folder = write_llama(tmp_path / "llama")
    before = log_probabilities(shoestring.load(str(folder), quantize="int8"))
    module = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        module.model.norm.weight.mul_(1.5)
    module.save_pretrained(folder)
    after = log_probabilities(shoestring.load(str(folder), quantize="int8"))
    assert np.abs(after - before).max() > 1e-3


def test_quantize_is_refused_where_nothing_reads_it(tmp_path):
    with pytest.raises(RequestError, match="unknown quantize 'int3'"):
        shoestring.load("smollm2-135m", quantize="int3")
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(UnsupportedModelError, match=r"quantize='int8' needs the native step.*gpt2"):
        shoestring.load(str(tmp_path / "gpt2"), quantize="int8")
    assert isinstance(shoestring.load(str(tmp_path / "gpt2")).runner, HFRunner)


def test_default_models_header_says_what_its_conversion_does():
    source = hub.open_source("smollm2-135m")
    folder = hub.resolve("smollm2-135m")
    converted = hub.load_pretrained("smollm2-135m")
    assert source.tokenizer.backend_tokenizer.to_str() == converted.tokenizer.backend_tokenizer.to_str()
    assert source.tokenizer.special_tokens_map == converted.tokenizer.special_tokens_map
    assert source.tokenizer.chat_template == converted.tokenizer.chat_template
    ours, theirs = source.config.to_dict(), converted.model.config.to_dict()
    labels = {
        "architectures",
        "_name_or_path",
        "_model_name_or_path",
        "dtype",
        "unk_token_id",
        "eos_token_id",
    }
    assert {key: value for key, value in ours.items() if key not in labels} == {
        key: value for key, value in theirs.items() if key not in labels
    }
    assert folder.is_dir()


def test_rows_do_not_depend_on_their_step(tmp_path):
    """Bit for bit, in every precision: that is why drafts cannot change a text."""
    folder = write_llama(tmp_path / "llama")
    models = [
        shoestring.load(str(folder), **options)
        for options in (
            {"dtype": "float32"},
            {"dtype": "bfloat16"},
            {"quantize": "int8"},
            {"quantize": "int4"},
        )
    ]
    models.append(shoestring.load(str(write_gguf(tmp_path / "tiny.gguf", kind="Q4_1"))))
    for model in models:
        runner = model.runner
        runner.open(0, SamplingOptions())
        together = runner.step({0: TokenTree.chain(TOKENS)}, Outputs(logits=True))[0]
        rows = [together.logits(row).clone() for row in range(len(TOKENS))]
        for row, token in enumerate(TOKENS):
            alone = runner.step({0: TokenTree.chain([token])}, Outputs(logits=True))[0].logits(0)
            assert torch.equal(alone, rows[row]), (model, row)
            runner.commit({0: [0]})
        runner.release(0)


def test_gguf_package_agrees_on_every_type(tmp_path):
    """The tensors as this package reads them equal the `gguf` package's expanded values."""
    from shoestring import _native
    from shoestring.quantization import WeightType

    path = write_gguf(tmp_path / "tiny.gguf", kind="Q5_1")
    source = hub.source.open_gguf(path, "tiny")
    maps = source.maps()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    theirs = gguf.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q5_1)
    rows, cols = source.tensors["layers.0.mlp.up_proj.weight"].shape
    row = np.empty((1, cols), np.float32)
    for index in range(rows):
        _native.dequantize_row(
            int(WeightType.Q5_1), rows, cols, maps["layers.0.mlp.up_proj.weight"], index, row
        )
        np.testing.assert_array_equal(row[0], theirs[index])

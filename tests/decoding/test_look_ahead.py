"""Look-ahead embeddings: what the file holds, which model they belong to, and what is refused."""

import json

import pytest
import torch
from architectures import ADMITTED
from comparing import generate, plain_model, prompt_of, untrained
from folders import write_gguf, write_llama
from safetensors.torch import save_file

import shoestring
from shoestring.decoding.look_ahead import (
    FILE_NAME,
    Base,
    LookAhead,
    bundled_look_ahead,
    load_look_ahead,
    read_look_ahead,
)
from shoestring.errors import ModelFileError, RequestError, UnsupportedModelError
from shoestring.hub import load_pretrained, open_source


@pytest.fixture
def own():
    """Embeddings that say that they belong to the tiny Llama."""
    base = {"name": "tiny", **Base.of_module(plain_model("llama")).describe()}
    return LookAhead(untrained(4).embeddings, {"base": base, "results": {"acceptance": [[0.5, 0.25]]}})


def test_a_file_reads_back_as_it_was_saved(own, tmp_path):
    own.save(tmp_path / "run" / FILE_NAME)
    for path in (tmp_path / "run" / FILE_NAME, tmp_path / "run", str(tmp_path / "run")):
        read = read_look_ahead(path)
        assert torch.equal(read.embeddings, own.embeddings)
        assert read.manifest == {"format": 1, **own.manifest}
        assert read.priors == {("pass", 1, 0): 0.5, ("pass", 1, 1): 0.25}
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]


def test_fewer_are_the_first_ones(own):
    assert torch.equal(own.first(2).embeddings, own.embeddings[:2])
    assert own.first(None) is own
    with pytest.raises(RequestError, match="tokens is 5, and 4 look-ahead embeddings are loaded"):
        own.first(5)


def test_the_model_itself_is_recognised_in_every_precision_and_a_little_changed(own):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = ADMITTED["llama"].build().to(dtype)
        assert own.checked(Base.of_module(model), "tiny") is own
        assert shoestring.LanguageModel(model, look_ahead=own).look_ahead.embeddings.dtype is dtype
    descendant = ADMITTED["llama"].build()
    weight = descendant.get_input_embeddings().weight
    with torch.no_grad():
        weight += 0.02 * weight.std() * torch.randn_like(weight)
    own.checked(Base.of_module(descendant), "fine-tuned")


def test_another_model_is_refused_by_what_differs(own):
    with pytest.raises(RequestError, match=r"trained for tiny .*hidden_size 64\); big has 96"):
        own.checked(Base.of_module(ADMITTED["llama"].build(hidden_size=96)), "big")
    with pytest.raises(RequestError, match=r"trained for tiny \(model_type llama\); other has mistral"):
        own.checked(Base.of_module(ADMITTED["mistral"].build()), "other")
    with pytest.raises(
        RequestError, match=r"whose token embedding is another than that of twin \(\d+ of 199"
    ):
        own.checked(Base.of_module(ADMITTED["llama"].build(seed=1)), "twin")
    with pytest.raises(RequestError, match="trained for another model"):
        untrained().checked(Base.of_module(plain_model("llama")), "tiny")


@pytest.mark.skipif(not ADMITTED["gemma3n"].exists, reason="no Gemma 3n in this version of transformers")
def test_a_model_whose_layers_look_up_token_ids_is_refused(own):
    with pytest.raises(UnsupportedModelError, match="n: its layers look up token ids"):
        own.checked(Base.of_module(ADMITTED["gemma3n"].build()), "n")


def write(path, tensors, metadata):
    save_file(tensors, path, metadata)
    return path


def manifest(**changes):
    return {"shoestring": json.dumps({"format": 1, "base": {"hidden_size": 4}, **changes})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"look_ahead": torch.zeros(0, 4)}, manifest(), r"its tensor is \[0, 4\].*L at least 1"),
        ({"look_ahead": torch.zeros(4)}, manifest(), r"its tensor is \[4\]"),
        ({"look_ahead": torch.zeros(2, 6)}, manifest(), "have 6 components, and its manifest says 4"),
        ({"look_ahead": torch.full((2, 4), torch.nan)}, manifest(), "not finite"),
        ({"weight": torch.zeros(2, 4)}, manifest(), r"holds no look-ahead embeddings.*\(it holds weight\)"),
        ({"look_ahead": torch.zeros(2, 4)}, None, "no look-ahead embeddings with a manifest"),
        ({"look_ahead": torch.zeros(2, 4)}, {"shoestring": "{"}, "manifest cannot be read"),
        ({"look_ahead": torch.zeros(2, 4)}, {"shoestring": "[]"}, "manifest cannot be read"),
        ({"look_ahead": torch.zeros(2, 4)}, manifest(format=2), "format 2; this version reads 1"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, tensors, metadata, message):
    path = write(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(ModelFileError, match=message):
        read_look_ahead(path)


def test_no_file_and_no_safetensors(tmp_path):
    with pytest.raises(RequestError, match=r"no file of look-ahead embeddings '.*missing'"):
        read_look_ahead(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelFileError, match="text is not a safetensors file"):
        read_look_ahead(tmp_path / "text")


def test_files_are_recognised_without_a_module(tmp_path):
    folder = write_llama(tmp_path / "folder")
    module = load_pretrained(folder, dtype="float32").model
    assert Base.of_source(open_source(folder)).describe() == Base.of_module(module).describe()
    gguf = write_gguf(tmp_path / "tiny.gguf")
    found = Base.of_source(open_source(gguf)).describe()
    assert found == Base.of_module(load_pretrained(gguf, dtype="float32").model).describe()
    assert found != Base.of_source(open_source(folder)).describe()


def test_names(own, tmp_path):
    base = Base.of_module(plain_model("llama"))
    own.save(tmp_path / FILE_NAME)
    assert load_look_ahead(None, base, "tiny") is None
    assert load_look_ahead("none", base, "smollm2-135m") is None
    assert len(load_look_ahead(str(tmp_path), base, "tiny")) == 4
    if bundled_look_ahead("smollm2-135m") is not None:
        with pytest.raises(RequestError, match="trained for smollm2-135m"):
            load_look_ahead("smollm2-135m", base, "tiny")


def test_a_loaded_model_decodes_with_them(own):
    model = shoestring.LanguageModel(ADMITTED["llama"].build(), name="tiny", look_ahead=own)
    prompt = prompt_of(12)
    for decoding in ("pass(budget=12)", "pass(two_call=true,tokens=2)", "auto(budget=12)"):
        generation = model.generate(prompt, decoding=decoding, max_new_tokens=9)
        assert generation.token_ids == generate(plain_model("llama"), prompt, 9)


def test_transformers_own_generate_takes_them(own, tmp_path):
    own.save(tmp_path / FILE_NAME)
    model, prompt = ADMITTED["llama"].build(), prompt_of(12)
    inputs = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 9, "pad_token_id": 0}
    output = model.generate(
        inputs,
        custom_generate=shoestring.custom_generate,
        decoding="pass(budget=12)",
        look_ahead=str(tmp_path),
        **options,
    )
    assert output[0, 12:].tolist() == generate(plain_model("llama"), prompt, 9)


def test_the_default_models_embeddings_come_with_the_package(smollm2):
    shipped = bundled_look_ahead("smollm2-135m")
    assert shipped is not None
    assert shipped.manifest["base"]["name"] == "smollm2-135m"
    assert shipped.manifest["results"]["base_unchanged"]
    assert shipped.checked(Base.of_module(smollm2.model), "smollm2-135m")
    assert len(shipped.priors) == len(shipped) * 4
    assert bundled_look_ahead("another") is None


def test_they_save_steps(smollm2):
    loaded = shoestring.LanguageModel(
        smollm2.model,
        smollm2.tokenizer,
        runner=smollm2.runner,
        look_ahead=load_look_ahead(None, Base.of_module(smollm2.model), "smollm2-135m"),
    )
    prompt = [{"role": "user", "content": "List the days of the week."}]
    plain = loaded.generate(prompt, decoding="autoregressive", max_new_tokens=32)
    fused = loaded.generate(prompt, decoding="pass(budget=24)", max_new_tokens=32)
    assert fused.token_ids == plain.token_ids
    assert fused.steps < plain.steps

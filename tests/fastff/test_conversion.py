"""Feedforwards of other people's models: found, imitated, replaced, and read back from disk."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from shoestring.errors import ModelFileError, RequestError, UnsupportedModelError
from shoestring.fastff.convert import (
    Distillation,
    convert_feedforwards,
    find_feedforwards,
    load_converted,
    replaced,
    save_converted,
)
from shoestring.fastff.layer import FastFeedForward

WIDE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=1, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2, n_positions=32, **ENDS)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "bert": lambda: BertForMaskedLM(BertConfig(**WIDE, max_position_embeddings=32)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=3, n_heads=2, max_position_embeddings=32)
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def rows(count=64):
    return torch.randint(3, 50, (count, 16), generator=torch.Generator().manual_seed(1))


def test_converted_models_come_back_from_disk(model, tmp_path):
    plain = model(input_ids=rows(4)).logits
    assert [site.layer for site in find_feedforwards(model)] == [0, 1, 2]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    done = convert_feedforwards(
        model, rows(), layers=[0, 2], feedforward="fff-2x3", steps=80, learning_rate=5e-3
    )
    assert done.layers == [0, 2]
    assert all(error < 0.97 for error in done.errors)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before if name in after)
    assert all(weight.requires_grad for weight in after.values())
    assert sum(isinstance(module, FastFeedForward) for module in model.modules()) == 2
    converted = model(input_ids=rows(4)).logits
    assert not torch.equal(converted, plain)
    save_converted(model, None, done.modules, "fff-2x3", tmp_path)
    assert torch.equal(load_converted(tmp_path)(input_ids=rows(4)).logits, converted)


def test_replaced_is_put_back_whatever_happens(model):
    plain = model(input_ids=rows(2)).logits
    modules = Distillation(model, None, "fff-1x2").modules_by_site()

    def fail():
        with replaced(model, modules):
            assert not torch.equal(model(input_ids=rows(2)).logits, plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(model(input_ids=rows(2)).logits, plain)


def test_student_that_has_the_originals_outputs_makes_no_error():
    """What is measured is the original's own input and output."""
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    distillation = Distillation(model, [1], "dense-8")
    original = model.model.layers[1].mlp
    distillation.students[0].forward = original.forward
    assert float(distillation(rows(4))["loss"]) == 0.0
    distillation.students[0].forward = lambda x: 2 * original.forward(x)
    assert float(distillation(rows(4))["loss"]) == pytest.approx(1.0)


def test_calibrated_students_are_folded_into_their_weights():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    distillation = Distillation(model, None, "fff-1x3")
    distillation.calibrate(rows(8))
    assert (distillation.scales < 0.1).all()  # an untrained model's feedforwards give little
    site, module = next(iter(distillation.modules_by_site().items()))
    x = torch.randn(5, 32)
    with torch.no_grad():
        expected = distillation.students[0](x) * distillation.scales[0]
    torch.testing.assert_close(module(x), expected)
    assert site.layer == 0


def test_what_cannot_be_converted_is_said(tmp_path):
    mixture = MixtralForCausalLM(MixtralConfig(**WIDE, num_key_value_heads=1, num_local_experts=2))
    with pytest.raises(UnsupportedModelError, match="Mixtral"):
        find_feedforwards(mixture)
    llama = MODELS["llama"]()
    with pytest.raises(RequestError, match=r"layers \[7\].*0 to 2"):
        convert_feedforwards(llama, rows(), layers=[7])
    with pytest.raises(RequestError, match="rows"):
        convert_feedforwards(llama, rows()[0])
    with pytest.raises(ModelFileError, match="no converted model"):
        load_converted(tmp_path)

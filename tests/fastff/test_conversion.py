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
from shoestring.fastff.convert import convert_feedforwards, load_converted, save_converted
from shoestring.fastff.imitation import Distillation, Together
from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.sites import find_feedforwards, replaced

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


def test_students_learn_together_what_they_did_not_learn_apart():
    torch.manual_seed(0)
    model = MODELS["gpt2"]().eval()
    for block in model.transformer.h:
        block.mlp.c_proj.weight.data *= 20  # so that feedforwards matter
    plain = model(input_ids=rows(4)).logits
    apart = Distillation(model, None, "fff-2x3")
    apart.calibrate(rows(16))
    together = Together(model, apart.modules_by_site())
    optimizer = torch.optim.Adam(together.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = together(rows(32))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(model(input_ids=rows(4)).logits, plain)
    some = together(rows(4), masked_positions=torch.zeros(4, 1, dtype=torch.long))["loss"]
    assert float(some.detach()) >= 0


def test_perfect_students_have_nothing_to_learn():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    site = find_feedforwards(model)[1]
    together = Together(model, {site: model.model.layers[1].mlp})
    assert float(together(rows(4))["loss"]) == pytest.approx(0.0, abs=1e-6)

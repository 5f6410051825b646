"""The encoder: what it computes, that it comes back from disk, and that its shapes are the paper's."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from shoestring.errors import RequestError
from shoestring.fastff.bert import (
    UltraFastBertForMaskedLM,
    UltraFastBertForSequenceClassification,
    register,
)
from shoestring.fastff.bert_config import UltraFastBertConfig
from shoestring.fastff.bert_recipe import feedforward_of
from shoestring.fastff.functional import visit
from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.scattered import ScatteredFastFeedForward, imbalance, scattered

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "depth": 3,
    "width": 12,
    "max_positions": 40,
}


def model_of(kind=UltraFastBertForMaskedLM, **changes):
    torch.manual_seed(0)
    return kind(UltraFastBertConfig(**{**SMALL, **changes})).eval()


def ids(rows=3, length=16):
    return torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
@pytest.mark.parametrize("feedforward", ["fff", "dense"])
def test_saved_and_loaded_is_the_same(tmp_path, positions, feedforward):
    register()
    model = model_of(positions=positions, feedforward=feedforward)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, UltraFastBertForMaskedLM)
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert again.decoder.weight is again.encoder.embeddings.tokens.weight


def test_pretrained_encoder_becomes_a_classifier(tmp_path):
    register()
    model = model_of()
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(classifier.encoder.state_dict()[name], weight), name
    assert classifier.eval()(ids()).logits.shape == (3, 3)


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
def test_order_of_the_tokens_matters(positions):
    model = model_of(positions=positions)
    for layer in model.encoder.layers:
        layer.attention.packed.weight.data *= 20  # untrained attention is nearly even
    assert not torch.allclose(model(ids()).logits.flip(1), model(ids().flip(1)).logits, atol=1e-4)


def test_rotation_knows_only_distances():
    """A text moved by padding in front has the same logits (the padding is masked)."""
    model = model_of(positions="rotary")
    for layer in model.encoder.layers:
        layer.attention.packed.weight.data *= 20
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids()], 1)
    mask = (torch.arange(21) >= 5).long().expand(3, -1)
    torch.testing.assert_close(model(padded, mask).logits[:, 5:], model(ids()).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [UltraFastBertForMaskedLM, UltraFastBertForSequenceClassification])
def test_padding_changes_nothing(kind):
    model = model_of(kind)
    padded = torch.cat([ids(), torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (torch.arange(20) < 16).long().expand(3, -1)
    found, plain = model(padded, mask).logits, model(ids()).logits
    if kind is UltraFastBertForMaskedLM:
        found = found[:, :16]
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def test_predicting_only_masked_positions_is_the_same_loss():
    model = model_of()
    positions = torch.tensor([[0, 3, 9], [1, 2, 15], [4, 5, 6]])
    labels = ids(3, 3)
    labels[1, 2] = -100
    whole = torch.full((3, 16), -100).scatter(1, positions, labels)
    some = model(ids(), masked_positions=positions, labels=labels)
    torch.testing.assert_close(some.loss, model(ids(), labels=whole).loss)
    torch.testing.assert_close(
        model(ids(), masked_positions=positions, labels=labels, num_items_in_batch=torch.tensor(8)).loss,
        some.loss,
    )
    torch.testing.assert_close(
        some.logits, model(ids()).logits.gather(1, positions[..., None].expand(-1, -1, 90))
    )


def test_trees_start_as_wide_as_ultrafastberts():
    layer = model_of().encoder.layers[0].feedforward
    assert isinstance(layer, FastFeedForward)
    for weight, bound in ((layer.w_in, 32**-0.5), (layer.b_in, 32**-0.5), (layer.w_out, 4**-0.5)):
        assert bound * 0.8 < float(weight.detach().abs().max()) <= bound


def test_the_papers_shapes():
    config = UltraFastBertConfig()
    assert (config.neurons, config.active_neurons) == (4095, 12)
    control = UltraFastBertConfig(**feedforward_of("dense-12"))
    assert control.neurons == control.active_neurons == config.active_neurons
    with torch.device("meta"):
        sizes = {
            name: UltraFastBertForMaskedLM(UltraFastBertConfig(**feedforward_of(name))).num_parameters()
            for name in ("fff-1x11", "dense-3072")
        }
    assert sizes["fff-1x11"] - sizes["dense-3072"] == 16 * (4095 - 3072) * (2 * 768 + 1)


@pytest.mark.parametrize("name", ["fff-11", "dense", "fff-0x3", "dense-0", "fff-1x40", "moe-8"])
def test_unknown_feedforwards_are_refused(name):
    with pytest.raises(RequestError, match=r"model\.feedforward"):
        feedforward_of(name)


def test_impossible_shapes_are_refused():
    with pytest.raises(RequestError, match="even width"):
        model_of(hidden_size=33)
    with pytest.raises(RequestError, match="rotary"):
        model_of(positions="rotery")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("trees", "depth"), [(1, 0), (1, 5), (3, 2)])
def test_scattered_training_is_masked_training_bit_for_bit(trees, depth, dtype):
    torch.manual_seed(0)
    found = []
    layer = ScatteredFastFeedForward(24, depth, trees=trees, dtype=dtype)
    x = torch.randn(40, 24, dtype=dtype)
    for method in ("scattered", "masked"):
        layer.zero_grad()
        layer.training_method = method
        own = x.clone().requires_grad_()
        y = layer(own)
        y.square().sum().backward()
        found.append([y.detach(), own.grad, *(weight.grad.clone() for weight in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    if dtype == torch.float64:
        with torch.no_grad():
            torch.testing.assert_close(layer(x), found[0][0])  # inference


def test_scattered_gradients_are_right():
    torch.manual_seed(0)
    layer = ScatteredFastFeedForward(5, 2, trees=2, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, *weights: scattered(x, *weights), (x, layer.w_in, layer.b_in, layer.w_out)
    )


def test_unknown_training_method_is_refused():
    with pytest.raises(RequestError, match="did you mean 'scattered'"):
        ScatteredFastFeedForward(4, 1, training_method="scatered")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # looked at by the tracer itself
@pytest.mark.parametrize("feedforward", ["fff", "dense"])
def test_one_compiled_graph_serves_all_layers(feedforward):
    """Without breaks; what the graph becomes is the compiler's matter, so it need not be run here."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = model_of(feedforward=feedforward, layers=10).train()
    plain = model.encoder(ids()).last_hidden_state
    for layer in model.encoder.layers:
        layer.compile(backend=backend, dynamic=False, fullgraph=True)
    torch.testing.assert_close(model.encoder(ids()).last_hidden_state, plain)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_balance_is_the_gradient_of_its_term():
    torch.manual_seed(0)
    x, w_in, w_out = (torch.randn(size, dtype=torch.float64) for size in ((50, 6), (2, 7, 6), (2, 7, 6)))
    x += 1
    upstream = torch.randn_like(x)
    for tensor in (x, w_in):
        tensor.requires_grad_()
    plain = torch.autograd.grad(scattered(x, w_in, None, w_out), (x, w_in), upstream)
    balanced = torch.autograd.grad(scattered(x, w_in, None, w_out, balance=3.0), (x, w_in), upstream)
    nodes, z = visit(x, w_in, None)
    wanted = torch.autograd.grad(3 * imbalance(z, nodes, 7), (x, w_in))
    for one, other, term in zip(balanced, plain, wanted, strict=True):
        assert term.abs().max() > 1e-4
        torch.testing.assert_close(one - other, term, rtol=1e-9, atol=1e-12)


def test_balance_spreads_tokens_that_share_a_direction():
    torch.manual_seed(0)
    x = torch.randn(512, 16) + 2
    found = []
    for balance in (0.0, 1.0):
        layer = ScatteredFastFeedForward(16, 3)
        layer.balance = balance
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            (0 * layer(x).sum()).backward()
            optimizer.step()
        nodes, z = visit(x, layer.w_in, layer.b_in)
        found.append(float(imbalance(z.detach(), nodes, 15)))
    assert found[1] < 0.02 < 0.1 < found[0]

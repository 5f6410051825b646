"""The layer: every method computes the same, training as evaluation, and wrong input is named."""

import pytest
import torch

from shoestring.errors import RequestError
from shoestring.fastff import FastFeedForward, functional


def layer_and_input(depth=4, trees=2, width=24, outputs=16, tokens=50, dtype=torch.float64, **keywords):
    torch.manual_seed(0)
    layer = FastFeedForward(width, depth, trees=trees, output_size=outputs, dtype=dtype, **keywords)
    return layer, torch.randn(tokens, width, dtype=dtype)


def by_hand(layer, x):
    """The loop of the paper, in numbers."""
    out = torch.zeros(len(x), layer.output_size, dtype=torch.float64)
    for t, row in enumerate(x):
        for tree in range(layer.trees):
            node = 0
            for _ in range(layer.depth + 1):
                z = row @ layer.w_in[tree, node]
                if layer.b_in is not None:
                    z = z + layer.b_in[tree, node]
                out[t] += torch.nn.functional.gelu(z) * layer.w_out[tree, node]
                node = 2 * node + 1 + int(z > 0)
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("depth", "trees"), [(0, 1), (0, 3), (1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize("method", ["plain", "masked"])
def test_computes_the_papers_loop(method, depth, trees, bias):
    layer, x = layer_and_input(depth, trees, bias=bias, method=method)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x))


def test_masked_and_plain_have_the_same_gradients():
    layer, x = layer_and_input()
    gradients = []
    for method in ("plain", "masked"):
        layer.method = method
        leaf = x.clone().requires_grad_()
        (layer(leaf) ** 2).sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad(set_to_none=True)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_paths_are_the_nodes_of_the_mask():
    layer, x = layer_and_input()
    nodes = layer.paths(x)
    assert nodes.shape == (50, 2, 5)
    logits = torch.einsum("te,kne->tkn", x, layer.w_in) + layer.b_in
    mask = functional.path_mask(logits)
    assert torch.equal(mask.sum(-1), torch.full((50, 2), 5))
    assert mask.gather(-1, nodes).all()


def test_sizes_are_told():
    layer = FastFeedForward(8, 11)
    assert (layer.neurons, layer.active_neurons) == (4095, 12)
    assert layer.w_in.shape == (1, 4095, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": -1}, "depth=-1"),
        ({"trees": 0}, "trees=0"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"activation": "gleu"}, "did you mean 'gelu'"),
        ({"method": "spares"}, "did you mean 'sparse'"),
    ],
)
def test_bad_sizes_are_refused(arguments, said):
    with pytest.raises(RequestError, match=said):
        FastFeedForward(**{"hidden_size": 8, "depth": 2, **arguments})

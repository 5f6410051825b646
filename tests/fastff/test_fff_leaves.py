"""The original form: soft training, hard evaluation, and what makes them agree."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoestring.errors import RequestError
from shoestring.fastff import FFF, FastFeedForward, hardening_loss, load_of


def made(depth=3, **keywords):
    torch.manual_seed(0)
    return FFF(10, 6, depth, output_size=4, dtype=torch.float64, **keywords), torch.randn(
        40, 10, dtype=torch.float64
    )


def leaf_output(layer, leaf, row):
    hidden = F.gelu(row @ layer.leaf_in[leaf] + layer.leaf_in_bias[leaf])
    return hidden @ layer.leaf_out[leaf] + layer.leaf_out_bias[leaf]


def soft_by_recursion(layer, row, node=0, level=0):
    """FORWARD_T of algorithm 1."""
    if level == layer.depth:
        return leaf_output(layer, node - (2**layer.depth - 1), row)
    c = torch.sigmoid(row @ layer.node_weight[node] + layer.node_bias[node])
    left = soft_by_recursion(layer, row, 2 * node + 1, level + 1)
    return (1 - c) * left + c * soft_by_recursion(layer, row, 2 * node + 2, level + 1)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_training_mixes_and_evaluation_takes_one_leaf(depth):
    layer, x = made(depth)
    soft = layer(x)
    torch.testing.assert_close(soft, torch.stack([soft_by_recursion(layer, row) for row in x]))
    layer.eval()
    leaves = layer.leaves(x)
    hard = torch.stack([leaf_output(layer, leaf, row) for leaf, row in zip(leaves, x, strict=True)])
    torch.testing.assert_close(layer(x), hard)  # leaf by leaf
    torch.testing.assert_close(torch.cat([layer(part) for part in x.split(7)]), hard)  # gathered
    if depth:
        assert leaves.unique().numel() > 1


def test_hard_decisions_make_both_modes_equal():
    layer, x = made()
    with torch.no_grad():
        layer.node_weight *= 1e6
        layer.node_bias *= 1e6
        torch.testing.assert_close(layer(x), layer.eval()(x))
    layer.train()(x)
    assert float(hardening_loss(layer, 1.0).detach()) < 1e-6


def test_hardening_hardens():
    layer, x = made()
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    layer(x)
    before = float(layer.entropy.detach())
    scores = F.linear(x, layer.node_weight, layer.node_bias).sigmoid()
    torch.testing.assert_close(
        layer.entropy, -(scores * scores.log() + (1 - scores) * (1 - scores).log()).mean()
    )
    for _ in range(60):
        optimizer.zero_grad()
        layer(x)
        hardening_loss(layer, 3.0).backward()
        optimizer.step()
    assert float(layer.entropy.detach()) < before / 4


def test_region_leak_turns_decisions_in_training_only():
    layer, x = made(region_leak=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_gradients_are_right():
    layer, x = made(2)
    parameters = tuple(layer.parameters())

    def loss(*tensors):
        named = dict(zip(dict(layer.named_parameters()), tensors, strict=True))
        return torch.func.functional_call(layer, named, (x[:5],))

    assert torch.autograd.gradcheck(loss, parameters)


def test_can_be_copied_after_a_training_step():
    layer, x = made()
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


def test_empty_batch_and_wrong_input():
    layer, _ = made()
    assert layer(torch.empty(0, 10, dtype=torch.float64)).shape == (0, 4)
    assert layer.eval()(torch.empty(0, 10, dtype=torch.float64)).shape == (0, 4)
    with pytest.raises(RequestError, match="hidden_size=10"):
        layer(torch.zeros(2, 11, dtype=torch.float64))
    with pytest.raises(RequestError, match="float32"):
        layer(torch.zeros(2, 10))
    for arguments, said in [((10, 6, -1), "depth=-1"), ((10, 0, 1), "leaf_size=0")]:
        with pytest.raises(RequestError, match=said):
            FFF(*arguments)
    with pytest.raises(RequestError, match="no FFF"):
        hardening_loss(nn.Linear(2, 2), 1.0)


def test_load_counts_visits_and_names_dead_subtrees():
    torch.manual_seed(0)
    layer = FastFeedForward(8, 3, trees=2)
    with torch.no_grad():
        layer.w_in[1, 0] = 0
        layer.b_in[1, 0] = -1  # the second tree's root sends everything left
    x = torch.randn(500, 8)
    nodes = layer.paths(x)
    load = load_of(nodes[:200], 15) + load_of(nodes[200:], 15)
    assert load.tokens == 500
    assert [int(level.sum()) for level in load.levels] == [1000] * 4
    assert int(load.visits[0, 1]) == int((nodes[:, 0, 1] == 1).sum())
    assert (1, 2) in load.dead_subtrees
    assert (1, 5) not in load.dead_subtrees
    assert load.dead[1] == 0.25
    assert load.evenness[0] == 1
    assert 0 < load.evenness[1] < 0.51
    with pytest.raises(RequestError, match="do not fit"):
        load_of(nodes, 31)

"""GPTQ against rounding to the nearest, the grids against the native packing, and whole models."""

import numpy as np
import pytest
import torch
from architectures import Architecture

from shoestring.engine.cuda.weights import pack_weight, weight_of_tiles
from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.quantization import (
    WeightType,
    calibrated,
    gptq,
    pack,
    pack_grid,
    round_to_nearest,
    rounded,
)

LLAMA = Architecture("LlamaConfig", "LlamaForCausalLM")
KINDS = {"int8": WeightType.INT8_TILES, "int4": WeightType.INT4_TILES}
both = pytest.mark.parametrize("quantize", list(KINDS))


def weight_of(outputs=48, inputs=192, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(inputs=192, count=1024, seed=1):
    """Inputs [count, inputs] of a few common causes and of very unlike sizes."""
    chance = torch.Generator().manual_seed(seed)
    causes = torch.randn(count, 24, generator=chance) @ torch.randn(24, inputs, generator=chance)
    sizes = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=chance)]
    return (causes + 0.5 * torch.randn(count, inputs, generator=chance)) * sizes


def moments_of(inputs):
    return inputs.T @ inputs / len(inputs)


def output_error(weight, grid, inputs):
    return ((grid.dense() - weight) @ inputs.T).square().mean().item()


@both
@pytest.mark.parametrize("order", [False, True], ids=["in place", "activation order"])
def test_outputs_err_far_less_than_those_of_rounding_to_nearest(quantize, order):
    weight, inputs, fresh = weight_of(), correlated(), correlated(seed=1)[512:]
    found = gptq(weight, moments_of(inputs[:512]), quantize, activation_order=order)
    nearest = output_error(weight, round_to_nearest(weight, quantize), fresh)
    assert output_error(weight, found, fresh) < 0.5 * nearest
    spanning = gptq(weight, moments_of(inputs[:512]), quantize, activation_order=order, clip=False)
    assert output_error(weight, spanning, fresh) < 0.5 * nearest


def test_errors_go_where_the_inverse_hessian_sends_them():
    """Column by column as in the paper's equations 2 and 3, the inverse updated by elimination, in float64."""
    weight, hessian = weight_of(5, 64), moments_of(correlated(64))
    found = gptq(weight, hessian, "int8")
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(64)
    left, inverse, expected = weight.double(), torch.linalg.inv(damped), torch.empty(5, 64)
    for at in range(64):
        if at % 32 == 0:
            scale = (left[:, at : at + 32].abs().amax(1).float() / 127).half().double()
        expected[:, at] = (left[:, at] / scale).clamp(-127, 127).round()
        error = (left[:, at] - expected[:, at] * scale) / inverse[at, at]
        left = left - error[:, None] * inverse[at]
        inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    differing = (found.levels != expected).float().mean()
    assert differing < 0.02  # float32 and float64 part where a weight lies between two levels
    nearest = round_to_nearest(weight, "int8")
    assert (nearest.levels != expected).float().mean() > 0.3


@both
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("hessian", [torch.eye(192) * 7, torch.zeros(192, 192)], ids=["identity", "zero"])
def test_independent_inputs_mean_rounding_to_nearest(quantize, clip, order, hessian):
    weight = weight_of()
    found = gptq(weight, hessian, quantize, clip=clip, activation_order=order)
    nearest = round_to_nearest(weight, quantize, clip=clip)
    assert torch.equal(found.levels, nearest.levels)
    assert torch.equal(found.dense(), nearest.dense())


def test_the_grid_that_clips_errs_less_than_the_one_that_spans():
    weight = weight_of()
    errors = [
        (round_to_nearest(weight, "int4", clip=clip).dense() - weight).square().sum()
        for clip in (True, False)
    ]
    assert errors[0] < 0.95 * errors[1]
    spanning = round_to_nearest(weight, "int4", clip=False)
    steps = spanning.scales.float().repeat_interleave(32, 1)
    assert ((spanning.dense() - weight).abs() <= 0.51 * steps + 1e-4).all()
    assert spanning.levels.unflatten(1, (-1, 32)).amin(2).max() == 0
    assert spanning.levels.unflatten(1, (-1, 32)).amax(2).min() == 15


@both
@pytest.mark.parametrize("outputs", [16, 21])
def test_nearest_is_what_the_native_part_packs(quantize, outputs):
    pytest.importorskip("shoestring._native", reason="built without the native part")
    weight = weight_of(outputs, 96)
    weight[2] = 0
    weight[3, :32] = 0.25
    ours, theirs = pack_grid(round_to_nearest(weight, quantize)), pack(weight, KINDS[quantize])
    assert (ours.type, ours.rows, ours.cols) == (theirs.type, theirs.rows, theirs.cols)
    assert np.array_equal(ours.data, theirs.data)


@both
@pytest.mark.parametrize("inputs", [96, 192])
def test_packing_a_grid_loses_nothing(quantize, inputs):
    weight = weight_of(21, inputs)
    found = gptq(weight, moments_of(correlated(inputs)), quantize)
    device = weight_of_tiles(pack_grid(found), "cpu", torch.float32)
    assert torch.equal(device.dense(), found.dense())
    if (
        quantize == "int8"
    ):  # the level 127 need not be used after GPTQ, so that packing anew is only nearly the same
        again = pack_weight(found.dense(), quantize).dense()
        assert (again - found.dense()).abs().max() <= 0.51 * found.scales.float().max()


@both
def test_the_native_part_reads_a_packed_grid(quantize):
    native = pytest.importorskip("shoestring._native", reason="built without the native part")
    found = gptq(weight_of(37, 128), moments_of(correlated(128)), quantize)
    dense = np.empty((37, 128), np.float32)
    native.quantized_dequantize(int(KINDS[quantize]), pack_grid(found).data, 37, 128, dense)
    assert np.array_equal(dense, found.dense().numpy())


@pytest.fixture
def tokens():
    return torch.randint(3, 199, (12, 24), generator=torch.Generator().manual_seed(3))


def parting(model, before, tokens):
    with torch.no_grad():
        after = model(tokens).logits
    return (after - before).square().mean().item()


@both
@pytest.mark.parametrize("tied", [False, True])
def test_a_calibrated_model_lies_on_its_grids(quantize, tied, tokens):
    model = LLAMA.build(tie_word_embeddings=tied)
    grids = calibrated(model, tokens, quantize, batch=5)
    weights = {name: value for name, value in model.named_parameters() if value.dim() > 1}
    assert grids.keys() == weights.keys()
    for name, grid in grids.items():
        assert torch.equal(weights[name], grid.dense()), name
        ends = "embed" in name or "head" in name
        assert grid.quantize == ("int8" if ends else quantize), name


def test_a_calibrated_model_departs_less_than_a_rounded_one(tokens):
    before = LLAMA.build()(tokens).logits.detach()
    errors = {}
    for order in (False, True):
        model = LLAMA.build()
        calibrated(model, tokens, "int4", activation_order=order)
        errors[order] = parting(model, before, tokens)
    for clip in (True, False):
        model = LLAMA.build()
        rounded(model, "int4", clip=clip)
        assert max(errors.values()) < 0.9 * parting(model, before, tokens)


def test_inputs_are_those_of_the_quantised_layers_before(tokens):
    """The last matrix of the last layer: its Hessian taken by hand, in the model as it stands at the end."""
    original = LLAMA.build().model.layers[1].mlp.down_proj.weight.detach()
    model = LLAMA.build()
    grids = calibrated(model, tokens, "int4", batch=4)
    seen = []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().flatten(0, 1)))
    model(tokens)
    expected = gptq(original, moments_of(seen[0]), "int4")
    found = grids["model.layers.1.mlp.down_proj.weight"]
    assert (expected.levels != found.levels).float().mean() < 0.02


def test_the_same_in_any_batches(tokens):
    first, second = LLAMA.build(), LLAMA.build()
    grids = calibrated(first, tokens, "int4", batch=12), calibrated(second, tokens, "int4", batch=5)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (grids[0][name].levels != grids[1][name].levels).float().mean() < 0.02


def test_odd_widths_stay_in_bfloat16(tokens):
    model = LLAMA.build(intermediate_size=90)
    grids = calibrated(model, tokens, "int4")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert "model.layers.0.mlp.down_proj.weight" not in grids
    assert torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(4, 33), torch.eye(33), "int4"), "33"),
        ((torch.zeros(4, 32), torch.eye(31), "int4"), "31"),
        ((torch.zeros(32), torch.eye(32), "int4"), "32"),
        ((torch.zeros(4, 32), torch.eye(32), "int3"), "int3"),
        ((torch.zeros(4, 32), torch.eye(32), None), "None"),
        ((torch.zeros(4, 32), torch.eye(32) * float("nan"), "int4"), "infinities"),
        ((torch.zeros(4, 32), -torch.eye(32), "int4"), "negative"),
        ((torch.zeros(4, 32), torch.ones(32, 32) - torch.eye(32) * 0.9, "int4"), "positive definite"),
    ],
)
def test_bad_input(arguments, said):
    weight, hessian, quantize = arguments
    with pytest.raises(RequestError, match=said):
        gptq(weight, hessian, quantize)


def test_no_damping_is_refused():
    with pytest.raises(RequestError, match="damping 0"):
        gptq(torch.zeros(4, 32), torch.eye(32), "int8", damping=0)


def test_bad_models_and_tokens(tokens):
    with pytest.raises(UnsupportedModelError, match="Linear"):
        calibrated(torch.nn.Linear(3, 3), tokens, "int4")
    with pytest.raises(RequestError, match=r"\[0, 4\]"):
        calibrated(LLAMA.build(), torch.zeros(0, 4, dtype=torch.long), "int4")
    with pytest.raises(RequestError, match="int5"):
        rounded(LLAMA.build(), "int5")

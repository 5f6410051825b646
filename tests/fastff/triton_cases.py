"""What the Triton kernels must do; `test_fff_triton.py` runs this file under Triton's interpreter, or on a GPU."""

import os

import pytest
import torch
from torch import Tensor

from shoestring.errors import RequestError
from shoestring.fastff import triton_inference as inference
from shoestring.fastff import triton_training as training
from shoestring.fastff.functional import ACTIVATIONS, plain

DEVICE = "cuda"
if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = "cpu"
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        """Triton 3.6 turns arrays of one element into loop bounds in a way that numpy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def layer(depth: int, trees: int, tokens: int, width: int, outputs: int, bias: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(depth * 1000 + trees * 100 + tokens)
    nodes = 2 ** (depth + 1) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    return [
        normal(tokens, width),
        normal(trees, nodes, width) / width**0.5,
        normal(trees, nodes) / 4 if bias else None,
        normal(trees, nodes, outputs) / (trees * (depth + 1)) ** 0.5,
    ]


def double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def assert_as_exact_as(ours: Tensor, twin: Tensor, exact: Tensor) -> None:
    """Our error is at most twice the twin's, or a few roundings of the largest value: we sum in one chain, BLAS in many."""
    assert ours.shape == exact.shape
    assert ours.dtype == twin.dtype
    if exact.numel():
        floor = 2e-6 * exact.abs().max().item()
        assert (ours - exact).abs().max() <= 2 * (twin - exact).abs().max() + floor


WAYS = {
    "path": inference.path,
    "path2": lambda *args: inference.path(*args, levels_per_step=2),
    "path3": lambda *args: inference.path(*args, levels_per_step=3),
    "grouped": inference.grouped,
}
# depth, trees, tokens, E, O, bias
SHAPES = [
    (0, 1, 5, 48, 48, True), (0, 3, 7, 48, 40, False), (1, 3, 7, 48, 40, True), (3, 1, 19, 768, 48, False),
    (5, 2, 9, 20, 24, True), (11, 1, 3, 768, 768, True), (11, 3, 2, 48, 48, False), (6, 1, 0, 16, 16, True),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_is_the_plain_twin(shape: tuple, way: str) -> None:
    tensors = layer(*shape)
    assert_as_exact_as(WAYS[way](*tensors), plain(*tensors), plain(*double(tensors)))


@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        ((0, 1, 5, 48, 48, True), "gelu"), ((0, 1, 1100, 16, 16, True), "gelu"), ((1, 3, 7, 48, 40, False), "silu"),
        ((3, 1, 33, 768, 48, True), "relu"), ((5, 3, 33, 48, 48, True), "gelu_tanh"), ((6, 1, 0, 16, 16, True), "gelu"),
        ((6, 1, 70, 16, 16, True), "gelu"), ((11, 1, 2, 48, 40, False), "gelu"),
    ],
    ids=str,
)  # fmt: skip
def test_gradients_are_the_plain_twins(shape: tuple, activation: str) -> None:
    tensors = layer(*shape)
    weights = torch.randn(shape[2], shape[4], generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients(function, tensors: list[Tensor | None]) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
        y = function(*tensors, activation)
        return [y, *torch.autograd.grad(y, leaves, weights.to(y.dtype))]

    exact = gradients(plain, double(tensors))
    for results in zip(gradients(training.apply, tensors), gradients(plain, tensors), exact, strict=True):
        assert_as_exact_as(*results)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    tensors = layer(2, 1, 9, 16, 16, True)
    exact = plain(*double(tensors), activation)
    for way in (inference.path, inference.grouped):
        assert_as_exact_as(way(*tensors, activation), plain(*tensors, activation), exact)


@pytest.mark.parametrize("way", WAYS)
def test_zero_goes_left_and_nan_stays_with_its_token(way: str) -> None:
    x, w_in, b_in, w_out = layer(6, 1, 20, 16, 16, True)
    x[3] = 0
    b_in[:, 0] = 0
    b_in[:, 1] = 0.5  # the root's left child turns right, so a token at the wrong one is seen
    x[5, 2] = float("nan")
    y, twin = WAYS[way](x, w_in, b_in, w_out), plain(x, w_in, b_in, w_out)
    torch.testing.assert_close(y, twin, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert y.isnan().any(1).sum() == 1


def test_leading_dimensions_and_all_tokens_in_one_subtree() -> None:
    x, w_in, b_in, w_out = layer(6, 1, 1, 16, 16, True)
    many = x.expand(66, 16).reshape(2, 33, 16)
    few = x.reshape(1, 1, 16)
    assert inference.infer(few, w_in, b_in, w_out).shape == (1, 1, 16)
    expected = plain(x, w_in, b_in, w_out).expand(66, 16).reshape(2, 33, 16)
    for plan in (inference.Plan("grouped"), inference.Plan("masked")):
        torch.testing.assert_close(inference.infer(many, w_in, b_in, w_out, plan=plan), expected)
    torch.testing.assert_close(training.apply(many, w_in, b_in, w_out), expected)


def test_tokens_are_sorted_stably_by_subtree() -> None:
    x, w_in, b_in, w_out = layer(7, 2, 300, 16, 16, True)
    shape = inference.shape_of(x, w_in, b_in, w_out, grouping=True)
    groups = inference.group(shape, x, w_in, b_in)
    for tree in range(2):
        node = torch.zeros(300, dtype=torch.long, device=DEVICE)
        for _ in range(shape.top):
            z = (x * w_in[tree, node]).sum(1) + b_in[tree, node]
            node = 2 * node + 1 + (z > 0)
        reached = node - (shape.groups - 1)
        assert torch.equal(groups.order[tree].long(), torch.sort(reached, stable=True).indices)
        assert torch.equal(groups.starts[tree].long().diff(), reached.bincount(minlength=shape.groups))


def test_operator_is_well_formed_and_compiles() -> None:
    tensors = layer(5, 2, 9, 16, 24, True)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(training._forward, (*tensors, "gelu"), test_utils=tests)
    compiled = torch.compile(training.apply, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(plain(*tensors).square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors).square().sum(), leaves), expected)


def test_autocast_gives_its_type_and_gradients_the_weights() -> None:
    tensors = layer(1, 1, 4, 16, 16, True)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autocast(DEVICE, torch.float16):
        y = training.apply(*tensors)
    assert y.dtype == torch.float16
    expected = torch.autograd.grad(plain(*tensors).sum(), leaves)
    ours = torch.autograd.grad(y.float().sum(), leaves)
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_what_does_not_fit_is_refused() -> None:
    x, w_in, b_in, w_out = layer(2, 1, 4, 16, 16, True)
    with pytest.raises(RequestError, match="don't fit"):
        inference.path(x[:, :8], w_in, b_in, w_out)
    with pytest.raises(RequestError, match="don't fit"):
        inference.grouped(x, w_in[:, :6], b_in[:, :6], w_out[:, :6])
    with pytest.raises(RequestError, match="float32"):
        training.apply(x.double(), w_in, b_in, w_out)
    with pytest.raises(RequestError, match="activation"):
        inference.path(x, w_in, b_in, w_out, "tanh")
    deep = torch.empty(1, 2**16 - 1, 1, device=DEVICE)
    with pytest.raises(RequestError, match="15 levels"):
        inference.grouped(x[:, :1], deep, None, deep)

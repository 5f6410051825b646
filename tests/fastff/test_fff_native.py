"""The C++ kernels against the plain loop: every instruction set, dtype and activation; bit-equal whatever the batch."""

import pytest
import torch

from shoestring.errors import RequestError
from shoestring.fastff import FastFeedForward, FastFeedForwardStack, functional, native

_native = pytest.importorskip("shoestring._native", reason="the native part is not built")

SETS = list(_native.instruction_sets())
DTYPES = [torch.float32, torch.bfloat16]


def random_weights(depth, trees, width, outputs, tokens, dtype, bias=True):
    generator = torch.Generator().manual_seed(depth + 10 * trees + width)
    nodes = 2 ** (depth + 1) - 1

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    w_in, w_out = random(trees, nodes, width, scale=width**-0.5), random(trees, nodes, outputs, scale=0.2)
    return random(tokens, width), w_in, random(trees, nodes, scale=0.1) if bias else None, w_out


def run(tensors, activation="gelu", threads=1, instruction_set="", residual=False):
    x, w_in, b_in, w_out = tensors
    kernel = native.kernel_of(
        w_in, b_in, w_out, activation, residual=residual, instruction_set=instruction_set
    )
    y = torch.full((len(x), w_out.shape[2]), float("nan"), dtype=x.dtype)
    kernel.run(x.data_ptr(), y.data_ptr(), len(x), threads)
    return y


def exact(tensors, activation="gelu"):
    """In double, and the tokens whose ways are certain."""
    x, w_in, b_in, w_out = (None if tensor is None else tensor.double() for tensor in tensors)
    logits = functional.visit(x, w_in, b_in)[1]
    return functional.plain(x, w_in, b_in, w_out, activation), logits.abs().amin((-1, -2)) > 1e-4


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("depth", "trees", "width", "outputs", "tokens"),
    [
        (0, 1, 8, 8, 3),
        (3, 2, 37, 50, 20),  # no whole vectors
        (5, 12, 100, 64, 30),  # more trees than lanes
        (7, 1, 144, 80, 300),  # sorted by subtree
        (6, 3, 130, 33, 200),
        (11, 1, 256, 256, 9),
    ],
)
def test_kernels_compute_the_plain_loop(instruction_set, dtype, depth, trees, width, outputs, tokens):
    for bias in (True, False):
        tensors = random_weights(depth, trees, width, outputs, tokens, dtype, bias)
        expected, certain = exact(tensors)
        y = run(tensors, instruction_set=instruction_set)
        assert certain.sum() >= tokens * 0.6
        error = (y.double() - expected)[certain].abs().max()
        if dtype == torch.float32:
            assert error < 5e-6
        else:  # one rounding, of the output; PyTorch's own loop rounds at every level
            assert error <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", list(functional.ACTIVATIONS))
def test_activations(instruction_set, activation):
    z = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-1, 1, 2001), torch.tensor([0.0, 1e-20])])
    one = torch.ones(1, 1, 1)
    y = run((z[:, None], one, None, one), activation, instruction_set=instruction_set)[:, 0]
    expected = functional.activation_function(activation)(z.double())
    error = (y.double() - expected).abs()
    assert (error <= 1e-6 + 4e-7 * z.abs().double()).all(), float(error.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "trees"), [(8, 1), (5, 3)])
def test_a_token_does_not_depend_on_its_batch_or_the_threads(dtype, depth, trees):
    tensors = random_weights(depth, trees, 96, 96, 500, dtype)
    x, *weights = tensors
    together = run(tensors)
    assert torch.equal(run(tensors, threads=2), together)
    assert torch.equal(run(tensors, threads=3), together)
    apart = torch.cat([run((part, *weights)) for part in (x[:1], x[1:3], x[3:40], x[40:])])
    assert torch.equal(apart, together)


def test_saved_ways_are_the_paths():
    for tokens in (5, 400):
        x, w_in, b_in, w_out = random_weights(6, 2, 64, 48, tokens, torch.float32)
        y, visited, logits = native.forward_saving(x, w_in, b_in, w_out, "gelu")
        assert torch.equal(y, run((x, w_in, b_in, w_out)))
        nodes, expected = functional.visit(x, w_in, b_in)
        certain = expected.abs().amin((-1, -2)) > 1e-4
        assert torch.equal(visited[certain].long(), nodes[certain])
        torch.testing.assert_close(logits[certain], expected[certain], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_a_stack_is_its_layers_one_after_another(dtype, residual, tokens):
    torch.manual_seed(0)
    layers = [FastFeedForward(64, 6, trees=1 + (tokens == 20), dtype=dtype) for _ in range(3)]
    x = torch.randn(tokens, 64).to(dtype)
    stack = FastFeedForwardStack(layers, residual=residual, threads=2)
    stack.use_huge_pages()
    expected = x
    for layer in layers:
        with torch.no_grad():
            weights = (layer.w_in, layer.b_in, layer.w_out)
            expected = run((expected.contiguous(), *weights), residual=residual)
    assert torch.equal(stack(x), expected)
    assert torch.equal(stack(x.view(1, tokens, 64)), expected.view(1, tokens, 64))


def test_a_residual_is_added():
    tensors = random_weights(4, 2, 32, 32, 200, torch.float32)
    torch.testing.assert_close(run(tensors, residual=True), run(tensors) + tensors[0])


def test_stacks_that_cannot_be_are_refused():
    layer = FastFeedForward(16, 2)
    for layers, said in [
        ([], "at least one"),
        ([layer, FastFeedForward(16, 3)], "layer 1's w_in"),
        ([layer, FastFeedForward(16, 2, activation="relu")], "layer 1 has another activation"),
        ([layer, FastFeedForward(16, 2, bias=False)], "layer 1's b_in"),
        ([FastFeedForward(16, 2, output_size=8)] * 2, "cannot follow"),
        ([FastFeedForward(16, 2, dtype=torch.float64)], "float64"),
    ]:
        with pytest.raises(RequestError, match=said):
            FastFeedForwardStack(layers)
    with pytest.raises(RequestError, match=r"\[3, 17\]"):
        FastFeedForwardStack([FastFeedForward(16, 2)])(torch.zeros(3, 17))


def test_workers_that_come_late_find_nothing_to_do():
    """More threads than processors, and kernels that go at once: no call hangs or differs."""
    tensors = random_weights(6, 1, 32, 32, 200, torch.float32)
    expected = run(tensors)
    for round_ in range(300):
        assert torch.equal(run(tensors, threads=2 + round_ % 3), expected)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="sizes"):
        _native.FastFeedForward(8, 8, -1, 1, False, 0, [(0, 0, 0)])
    with pytest.raises(ValueError, match="not available"):
        _native.FastFeedForward(8, 8, 1, 1, False, 0, [(0, 0, 0)], False, "mmx")

"""The layer's methods: sparse training, the native kernels behind a module, wrong input, saving."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoestring.errors import RequestError
from shoestring.fastff import FastFeedForward, functional, methods, native, triton_reach
from shoestring.fastff.sparse import activation_slope, sparse

needs_native = pytest.mark.skipif(not native.available(), reason="the native part is not built")


def weights(depth=3, trees=2, width=24, outputs=20, dtype=torch.float64, bias=True, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nodes = 2 ** (depth + 1) - 1

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    w_in, w_out = random(trees, nodes, width, scale=width**-0.5), random(trees, nodes, outputs, scale=0.3)
    return random(tokens, width), w_in, random(trees, nodes, scale=0.2) if bias else None, w_out


def gradients(function, tensors, activation):
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves, activation)
    factors = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    (y * factors).sum().backward()
    return y.detach(), [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("activation", list(functional.ACTIVATIONS))
def test_sparse_gradients_by_finite_differences(activation):
    x, w_in, b_in, w_out = (t.requires_grad_() for t in weights(depth=2, width=5, outputs=4, tokens=6))
    assert torch.autograd.gradcheck(lambda *given: sparse(*given, activation), (x, w_in, b_in, w_out))


@pytest.mark.parametrize("activation", list(functional.ACTIVATIONS))
@pytest.mark.parametrize(("depth", "trees"), [(0, 3), (1, 1), (5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_training_equals_masked(dtype, depth, trees, activation, bias):
    tensors = weights(depth, trees, dtype=dtype, bias=bias, tokens=150)
    ours, our_gradients = gradients(sparse, tensors, activation)
    exact = [None if tensor is None else tensor.double() for tensor in tensors]
    theirs, their_gradients = gradients(functional.masked, exact, activation)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


@needs_native
def test_sparse_training_does_not_depend_on_threads():
    tensors = weights(7, 1, 64, 64, torch.float32, tokens=300)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(sparse, tensors, "gelu"))
    torch.set_num_threads(before)
    for y, found in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(one, other) for one, other in zip(found, results[0][1], strict=True))


def test_unvisited_neurons_get_zero_gradients():
    x, w_in, b_in, w_out = weights(4, 1, dtype=torch.float32, tokens=1)
    visited = functional.paths(x, w_in, b_in)[0, 0]
    _, (_, grad_in, grad_bias, grad_out) = gradients(sparse, (x, w_in, b_in, w_out), "gelu")
    for gradient in (grad_in, grad_bias[..., None], grad_out):
        touched = gradient[0].abs().sum(-1).nonzero().flatten()
        assert torch.equal(touched, visited)


def test_sparse_in_bfloat16_sums_in_float32():
    tensors = weights(3, 1, dtype=torch.bfloat16, tokens=400)
    exact = [tensor.double() for tensor in tensors]
    _, ours = gradients(sparse, tensors, "gelu")
    _, masked = gradients(functional.masked, tensors, "gelu")
    _, theirs = gradients(functional.masked, exact, "gelu")
    error = [(one.double() - other).norm() / other.norm() for one, other in zip(ours, theirs, strict=True)]
    bound = [(one.double() - other).norm() / other.norm() for one, other in zip(masked, theirs, strict=True)]
    assert all(one <= 2 * other for one, other in zip(error, bound, strict=True)), (error, bound)


@pytest.mark.parametrize("name", list(functional.ACTIVATIONS))
def test_slopes_of_activations(name):
    z = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    functional.activation_function(name)(z).sum().backward()
    torch.testing.assert_close(activation_slope(name, z.detach()), z.grad)


def test_operator_is_declared_correctly():
    x, w_in, b_in, w_out = (t.requires_grad_() for t in weights(2, dtype=torch.float32))
    operator = torch.ops.shoestring.fast_feedforward_sparse.default
    torch.library.opcheck(operator, (x, w_in, b_in, w_out, "gelu"))
    torch.library.opcheck(operator, (x, w_in, None, w_out, "relu"))


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    layer = FastFeedForward(16, 3, method="sparse")
    x = torch.randn(5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for one, other in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_evaluation_give_the_same(dtype):
    torch.manual_seed(0)
    layer = FastFeedForward(64, 5, trees=2, dtype=dtype)
    x = torch.randn(30, 64, dtype=dtype)
    for method in ("plain", "masked", "sparse"):
        layer.method = method
        assert torch.equal(layer.train()(x), layer.eval()(x))
    layer.method = "auto"
    trained = layer.train()(x)  # sparse or masked
    with torch.no_grad():
        evaluated = layer.eval()(x)  # native where it was built
    decided = functional.visit(x, layer.w_in, layer.b_in)[1].abs().amin((-1, -2)) > 1e-2
    assert decided.sum() > 10
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(trained[decided], evaluated[decided], **tolerance)


@needs_native
def test_auto_takes_the_kernels_on_a_cpu():
    x, *tensors = weights(dtype=torch.float32)
    assert methods.choose(x, *tensors) == "native"
    tensors[0].requires_grad_()
    assert methods.choose(x, *tensors) == "sparse"
    assert methods.choose(x.double(), *(t.double() for t in tensors)) == "masked"
    with torch.no_grad():
        assert methods.choose(x, *tensors) == "native"
        assert methods.choose(x[:2].double(), *(t.double() for t in tensors)) == "plain"


@pytest.mark.parametrize(
    ("tokens", "trees", "depth", "training", "triton", "chosen"),
    [
        (1, 1, 11, False, True, "triton"), (16384, 1, 13, False, True, "triton"), (16384, 1, 11, True, True, "triton"),
        # Smaller than where the kernels were measured to be faster.
        (64, 1, 10, False, True, "plain"), (65, 1, 10, False, True, "masked"), (1, 3072, 11, False, True, "plain"),
        (256, 1, 11, True, True, "masked"), (16384, 12, 11, True, True, "masked"),
        # Without them.
        (64, 1, 11, False, False, "plain"), (65, 1, 11, False, False, "masked"), (16384, 1, 11, True, False, "masked"),
    ],
)  # fmt: skip
def test_auto_without_cpu_kernels_goes_by_the_measured_sizes(tokens, trees, depth, training, triton, chosen):
    assert methods.choose_by_size(tokens, trees, depth, training=training, triton=triton) == chosen


def test_what_the_gpu_kernels_take():
    _, w_in, b_in, w_out = weights(dtype=torch.bfloat16)
    deep = torch.empty(1, 2**16 - 1, 1)
    for training in (True, False):
        assert not triton_reach.why_not_weights(w_in, b_in, w_out, training=training)
        assert not triton_reach.why_not_weights(w_in, None, w_out, training=training)
        for given, said in [
            ((w_in.double(), None, w_out.double()), "float64"),
            ((w_in, b_in, w_out.float()), "one dtype"),
            ((w_in, b_in.float(), w_out), "one dtype"),
            ((w_in.mT.contiguous().mT, b_in, w_out), "contiguous"),
        ]:
            assert said in triton_reach.why_not_weights(*given, training=training)
    assert "at most 15 levels, not 16" in triton_reach.why_not_weights(deep, None, deep, training=True)
    assert not triton_reach.why_not_weights(deep, None, deep, training=False)
    assert not triton_reach.why_not_weights(w_in, b_in, w_out, training=True, compiling=True)
    assert "torch.compile" in triton_reach.why_not_weights(w_in, b_in, w_out, training=False, compiling=True)
    assert "not an NVIDIA GPU" in triton_reach.why_not(w_in[0], w_in, b_in, w_out, training=False)


def test_auto_without_kernels_compiles_without_graph_breaks():
    torch.manual_seed(0)
    layer, x = FastFeedForward(16, 3, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    compiled = torch.compile(
        layer, fullgraph=True, backend="eager"
    )  # asks what the kernels take in the graph
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@needs_native
def test_a_kept_kernel_follows_the_weights():
    torch.manual_seed(0)
    layer, other = FastFeedForward(32, 4), FastFeedForward(32, 4)
    x = torch.randn(3, 32)

    def both():
        expected = functional.plain(
            x.to(layer.w_in.dtype), layer.w_in, layer.b_in, layer.w_out, layer.activation
        )
        torch.testing.assert_close(layer(x.to(layer.w_in.dtype)), expected, atol=2e-2, rtol=2e-2)
        assert layer._ready is not None

    with torch.no_grad():
        both()
        both()
        layer.w_in += 1  # in place
        both()
        layer.load_state_dict(other.state_dict())
        both()
        layer.load_state_dict({k: 2 * v for k, v in other.state_dict().items()}, assign=True)
        both()
        layer.w_out.data = torch.randn_like(layer.w_out)
        both()
        layer.activation = "relu"
        both()
        layer.method = "plain"
        assert torch.equal(layer(x), functional.plain(x, layer.w_in, layer.b_in, layer.w_out, "relu"))
        layer.method = "auto"
        layer.b_in = None
        both()
        torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
        layer.double()  # which the kernels do not take
        expected = functional.plain(x.double(), layer.w_in, None, layer.w_out, "relu")
        torch.testing.assert_close(layer(x.double()), expected)
    layer.float()
    layer(x).sum().backward()  # the kept kernel gives no gradients, so it isn't used
    assert layer.w_in.grad is not None
    tracked = x.clone().requires_grad_()
    layer.requires_grad_(False)(tracked).sum().backward()
    assert tracked.grad is not None


@pytest.mark.parametrize("method", ["plain", "masked", "sparse", "native"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_token(method, bad):
    if method == "native" and not native.available():
        pytest.skip("the native part is not built")
    torch.manual_seed(0)
    layer = FastFeedForward(32, 4, method=method)
    x = torch.randn(20, 32)
    with torch.no_grad():
        clean = layer(x)
        x[7, 3] = bad
        spoiled = layer(x)
    assert torch.equal(spoiled[7].isfinite(), torch.zeros(32, dtype=torch.bool))
    others = torch.arange(20) != 7
    torch.testing.assert_close(spoiled[others], clean[others])


def test_shapes_strides_and_empty_batches():
    torch.manual_seed(0)
    layer = FastFeedForward(16, 2, output_size=8)
    x = torch.randn(3, 16, 5).transpose(1, 2)  # not contiguous
    for method in ("auto", "plain", "masked", "sparse"):
        layer.method = method
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer(x.contiguous()))
            assert layer(x).shape == (3, 5, 8)
            assert layer(x[0, 0]).shape == (8,)
            for shape in [(0, 16), (2, 0, 16)]:
                assert layer(torch.empty(shape)).shape == (*shape[:-1], 8)
        empty = torch.empty(0, 16, requires_grad=True)
        layer(empty).sum().backward()
        assert float(layer.w_in.grad.abs().sum()) == 0
        layer.zero_grad()


def test_wrong_input_is_named():
    layer = FastFeedForward(16, 2)
    with torch.no_grad():
        layer(torch.zeros(1, 16))  # a kernel is kept, and does not take these either
    for x, said in [
        (torch.zeros(3, 17), r"\[3, 17\].*hidden_size=16"),
        (torch.tensor(1.0), "hidden_size=16"),
        (torch.zeros(3, 16, dtype=torch.bfloat16), "bfloat16.*float32"),
        (torch.zeros(3, 16, device="meta"), "meta"),
    ]:
        with pytest.raises(RequestError, match=said), torch.no_grad():
            layer(x)
    layer.method = "triton"
    with pytest.raises(RequestError, match="GPU"):
        layer(torch.zeros(1, 16))


@needs_native
def test_native_refuses_to_train():
    layer = FastFeedForward(16, 2, method="native")
    with pytest.raises(RequestError, match="inference only"):
        layer(torch.zeros(1, 16))


def test_autocast_takes_its_type():
    torch.manual_seed(0)
    layer = FastFeedForward(16, 2)
    x = torch.randn(4, 16)
    with torch.no_grad():
        layer(x)
    for method in ("auto", "masked", "sparse", "plain"):
        layer.method = method
        for given in (x, x.bfloat16()):
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(given)
            assert y.dtype == torch.bfloat16
            y.float().sum().backward()
    assert layer.w_in.grad.dtype == torch.float32


def test_safetensors_round_trip(tmp_path):
    torch.manual_seed(0)
    layer, twin = FastFeedForward(16, 3, trees=2), FastFeedForward(16, 3, trees=2)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    twin.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(4, 16)
    assert torch.equal(layer(x), twin(x))
    assert set(layer.state_dict()) == {"w_in", "b_in", "w_out"}
    with pytest.raises(RuntimeError, match="size mismatch"):
        FastFeedForward(16, 2, trees=2).load_state_dict(layer.state_dict())

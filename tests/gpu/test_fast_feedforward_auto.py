"""`auto` on a GPU takes the Triton kernels where they pay, and what it computes is the plain twin's."""

import pytest
import torch

from shoestring.fastff import FastFeedForward, functional, methods

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def weights_of(layer):
    return layer.w_in, layer.b_in, layer.w_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_plain_twin(dtype):
    torch.manual_seed(0)
    layer = FastFeedForward(64, 11, device="cuda", dtype=dtype)
    x = torch.randn(4096, 64, device="cuda", dtype=dtype)
    decided = functional.visit(x, *weights_of(layer)[:2])[1].abs().amin((-1, -2)) > 1e-2
    assert decided.sum() > 100
    expected = functional.plain(x, *weights_of(layer))
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert methods.choose(x, *weights_of(layer)) == "triton"
            torch.testing.assert_close(layer(x)[decided], expected[decided], **tolerance)
    assert methods.choose(x[:8], *weights_of(layer)) == "masked"  # gradients of few tokens


@pytest.mark.filterwarnings("ignore")  # Inductor's own, of deprecated imports and of TF32
def test_auto_compiles_without_graph_breaks():
    torch.manual_seed(0)
    layer = FastFeedForward(64, 11, device="cuda")
    x = torch.randn(4096, 64, device="cuda")
    compiled = torch.compile(layer, fullgraph=True)
    upstream = torch.randn_like(x)
    found, expected = (
        torch.autograd.grad(of(x), list(layer.parameters()), upstream) for of in (compiled, layer)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    with torch.no_grad():  # dense products there, whose rounding may part a path
        decided = functional.visit(x, *weights_of(layer)[:2])[1].abs().amin((-1, -2)) > 1e-3
        torch.testing.assert_close(compiled(x)[decided], layer(x)[decided], atol=1e-4, rtol=1e-4)

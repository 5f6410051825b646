"""Products of few rows with a matrix that is streamed once: dense, int8 or int4, with what surrounds them fused in.

Everything is written into a given `out`; up to `MAX_ROWS` rows nothing is allocated and nothing waits for the device, so
that the calls can be captured in a CUDA graph. More rows (prefill) go to PyTorch's product.
"""

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shoestring.engine.cuda.one_row_kernels import dequantize_kernel
from shoestring.engine.cuda.products import (
    KIND_BITS,
    Launch,
    LinearWorkspace,
    Norm,
    Product,
    ScaledRows,
    chosen,
    launches,
    left_by,
)
from shoestring.engine.cuda.tuning import MAX_ROWS, LaunchConfig, Tuning
from shoestring.engine.cuda.weights import GROUP, DeviceWeight
from shoestring.errors import RequestError

__all__ = ["gated_linear", "linear", "linear_twin"]

_ACTIVATIONS = (None, "silu", "gelu_tanh", "gelu", "relu")


def linear(
    x: Float[Tensor, "M K"],
    weight: DeviceWeight,
    out: Float[Tensor, "M N"],
    *,
    workspace: LinearWorkspace | None,
    norm: Norm | None = None,
    bias: Float[Tensor, " N"] | None = None,
    residual: Float[Tensor, "M N"] | None = None,
    activation: str | None = None,
    scaled: ScaledRows | None = None,
    next_norm: Norm | None = None,
    tuning: Tuning | None = None,
    config: LaunchConfig | None = None,
) -> ScaledRows | None:
    """Write `activation(norm(x) W^T + bias) + residual` into `out`.

    Tensors may be of any floating type; rows may be strided, their elements are dense.

    Args:
        workspace: with None no sum is split and norms are always fused, which can be far slower: no default, lest it is
            forgotten.
        residual: may be `out` itself.
        activation: None, "silu", "gelu_tanh", "gelu" or "relu".
        scaled: what an earlier product returned for this `norm`: the rows are read from there.
        next_norm: the norm of `out` that comes next.
        tuning: what was measured on this machine where None.
        config: this very launch, whatever was measured.

    Returns:
        The rows as the product behind `next_norm` reads them, in the workspace until the next product that leaves or
        normalises rows; None where that one had better start from `out`.

    Raises:
        RequestError: shapes that do not fit, an unknown activation.
    """
    product = Product(x, weight, None, out, norm, bias, residual, activation, scaled, next_norm)
    return _multiply(product, workspace, tuning, config)


def gated_linear(
    x: Float[Tensor, "M K"],
    gate: DeviceWeight,
    up: DeviceWeight,
    out: Float[Tensor, "M N"],
    *,
    workspace: LinearWorkspace | None,
    norm: Norm | None = None,
    activation: str = "silu",
    scaled: ScaledRows | None = None,
    tuning: Tuning | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Write `activation(norm(x) G^T) * (norm(x) U^T)` into `out`; the rest is as for `linear`."""
    if (gate.kind, gate.dtype, gate.outputs, gate.inputs) != (up.kind, up.dtype, up.outputs, up.inputs):
        raise RequestError(
            f"gate {gate.kind} [{gate.outputs}, {gate.inputs}] and up {up.kind} [{up.outputs}, {up.inputs}] differ"
        )
    _multiply(
        Product(x, gate, up, out, norm, activation=activation, scaled=scaled), workspace, tuning, config
    )


def linear_twin(
    x: Float[Tensor, "M K"],
    weight: DeviceWeight,
    up: DeviceWeight | None = None,
    *,
    norm: Norm | None = None,
    bias: Float[Tensor, " N"] | None = None,
    residual: Float[Tensor, "M N"] | None = None,
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "M N"]:
    """Both in plain PyTorch, products in `dtype`, in a new tensor."""
    values = (x.to(dtype) if norm is None else _normed(x, norm)).to(dtype)
    result = functional.linear(values, weight.dense(dtype), None if bias is None else bias.to(dtype))
    result = _activated(result, activation)
    if up is not None:
        result = result * functional.linear(values, up.dense(dtype))
    return result if residual is None else result + residual.to(dtype)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    gain = norm.gain.to(wide.dtype) + (1.0 if norm.adds_one else 0.0)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon) * gain


def _activated(x: Tensor, activation: str | None) -> Tensor:
    if activation == "silu":
        return functional.silu(x)
    if activation == "relu":
        return functional.relu(x)
    if activation is None:
        return x
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _multiply(
    product: Product, workspace: LinearWorkspace | None, tuning: Tuning | None, config: LaunchConfig | None
) -> ScaledRows | None:
    x, weight, out, activation = product.x, product.weight, product.out, product.activation
    rows, inputs = x.shape
    if inputs != weight.inputs or out.shape != (rows, weight.outputs):
        raise RequestError(
            f"rows {list(x.shape)} and a weight [{weight.outputs}, {weight.inputs}] do not give {list(out.shape)}"
        )
    if activation not in _ACTIVATIONS:
        raise RequestError(f"unknown activation {activation!r}: one of {', '.join(map(str, _ACTIVATIONS))}")
    if rows > MAX_ROWS:
        _prefill(product)
        return None
    tuning = tuning or Tuning.of_machine(x.device)
    config = config or chosen(product, workspace, tuning)
    for launch in launches(product, workspace, tuning, config):
        launch.run()
    return left_by(product, config, workspace)


def _prefill(product: Product) -> None:
    """Many rows: PyTorch's product, with quantised weights written out once."""
    x, weight, up = product.x, product.weight, product.up
    values = (x if product.norm is None else _normed(x, product.norm)).to(weight.dtype)
    result = _activated(_matmul(values, weight, product.bias), product.activation)
    if up is not None:
        result *= _matmul(values, up, None)
    if product.residual is not None:
        result = result + product.residual
    product.out.copy_(result)


def _matmul(values: Tensor, weight: DeviceWeight, bias: Tensor | None) -> Tensor:
    matrix = _written_out(weight).T
    if values.is_cuda and weight.dtype != torch.float32:
        result = torch.mm(values, matrix, out_dtype=torch.float32)
    else:
        result = (values @ matrix).float()
    return result if bias is None else result.add_(bias)


def _written_out(weight: DeviceWeight) -> Tensor:
    if weight.scales is None:
        return weight.values
    out = torch.empty(weight.outputs, weight.inputs, dtype=weight.dtype, device=weight.values.device)
    blocks = {"BLOCK_N": 32, "BLOCK_K": 4 * GROUP}
    Launch(
        dequantize_kernel,
        (triton.cdiv(weight.outputs, blocks["BLOCK_N"]), triton.cdiv(weight.inputs, blocks["BLOCK_K"])),
        (
            weight.values, weight.scales, out, weight.outputs, weight.values.stride(0), weight.scales.stride(0),
            out.stride(0),
        ),
        {"K": weight.inputs, "KIND": KIND_BITS[weight.kind], **blocks},
    ).run()  # fmt: skip
    return out

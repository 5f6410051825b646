"""Products of few rows with a matrix that is streamed once: dense, int8 or int4, with what surrounds them fused in.

Everything is written into a given `out`; up to `MAX_ROWS` rows nothing is allocated and nothing waits for the device, so
that the calls can be captured in a CUDA graph. More rows (prefill) go to PyTorch's product.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from shoestring.engine.cuda.linear_kernels import few_rows_kernel
from shoestring.engine.cuda.one_row_kernels import dequantize_kernel, norm_kernel, one_row_kernel
from shoestring.engine.cuda.tuning import MAX_ROWS, LaunchConfig, Problem, Tuning
from shoestring.engine.cuda.weights import GROUP, DeviceWeight
from shoestring.engine.cuda.whole_rows_kernel import whole_rows_kernel
from shoestring.errors import RequestError

__all__ = ["Launch", "LinearWorkspace", "Norm", "gated_linear", "launches", "linear", "linear_twin"]

_ACTIVATIONS = (None, "silu", "gelu_tanh", "gelu", "relu")
_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_PTX = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_BITS = {"dense": 0, "int8": 8, "int4": 4}


class Norm(Protocol):
    """An RMSNorm: `x / sqrt(mean(x^2) + epsilon) * gain`, or `* (1 + gain)` where `adds_one`."""

    @property
    def gain(self) -> Tensor:
        """[K]."""

    @property
    def epsilon(self) -> float:
        """What keeps rows of zeros from being divided by zero."""

    @property
    def adds_one(self) -> bool:
        """Whether the gain is stored less one (Gemma)."""


@dataclass(frozen=True)
class LinearWorkspace:
    """Room for shares of split sums and for normalised rows; one serves all products of a stream, one after another."""

    shares: Tensor
    arrived: Tensor
    normed: Tensor

    @classmethod
    def allocate(
        cls, device: torch.device | str, *, width: int, shares: int = 1 << 23, tiles: int = 1 << 12
    ) -> "LinearWorkspace":
        """Room for inputs at most `width` wide; a split that would need more than `shares` floats is not made."""
        return cls(
            torch.zeros(shares, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
            torch.zeros(MAX_ROWS * width * 2, dtype=torch.float16, device=device),
        )

    def rows(self, count: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Room for normalised rows [count, width]; None where it is too small."""
        room = self.normed.view(dtype)
        return room[: count * width].view(count, width) if count * width <= len(room) else None


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """Put it on the current stream."""
        self.kernel[self.grid](*self.arguments, **self._options())

    def compile(self) -> None:
        """Compile it, without a run (inside `triton.AsyncCompileMode`: in the background)."""
        self.kernel.warmup(*self.arguments, grid=self.grid, **self._options())

    def _options(self) -> dict[str, Any]:
        early = {"launch_pdl": True} if self.constants.get("PDL") else {}
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages, **early}


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
    tuning: Tuning | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Write `activation(norm(x) W^T + bias) + residual` into `out`.

    Tensors may be of any floating type; rows may be strided, their elements are dense.

    Args:
        workspace: with None no sum is split and norms are always fused, which can be far slower: no default, lest it is
            forgotten.
        residual: may be `out` itself.
        activation: None, "silu", "gelu_tanh", "gelu" or "relu".
        tuning: what was measured on this machine where None.
        config: this very launch, whatever was measured.

    Raises:
        RequestError: shapes that do not fit, an unknown activation.
    """
    _multiply(x, weight, None, out, norm, bias, residual, activation, workspace, tuning, config)


def gated_linear(
    x: Float[Tensor, "M K"],
    gate: DeviceWeight,
    up: DeviceWeight,
    out: Float[Tensor, "M N"],
    *,
    workspace: LinearWorkspace | None,
    norm: Norm | None = None,
    activation: str = "silu",
    tuning: Tuning | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Write `activation(norm(x) G^T) * (norm(x) U^T)` into `out`; the rest is as for `linear`."""
    if (gate.kind, gate.dtype, gate.outputs, gate.inputs) != (up.kind, up.dtype, up.outputs, up.inputs):
        raise RequestError(
            f"gate {gate.kind} [{gate.outputs}, {gate.inputs}] and up {up.kind} [{up.outputs}, {up.inputs}] differ"
        )
    _multiply(x, gate, up, out, norm, None, None, activation, workspace, tuning, config)


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
    x: Tensor,
    weight: DeviceWeight,
    up: DeviceWeight | None,
    out: Tensor,
    norm: Norm | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    workspace: LinearWorkspace | None,
    tuning: Tuning | None,
    config: LaunchConfig | None,
) -> None:
    rows, inputs = x.shape
    if inputs != weight.inputs or out.shape != (rows, weight.outputs):
        raise RequestError(
            f"rows {list(x.shape)} and a weight [{weight.outputs}, {weight.inputs}] do not give {list(out.shape)}"
        )
    if activation not in _ACTIVATIONS:
        raise RequestError(f"unknown activation {activation!r}: one of {', '.join(map(str, _ACTIVATIONS))}")
    if rows > MAX_ROWS:
        _prefill(x, weight, up, out, norm, bias, residual, activation)
        return
    for launch in launches(x, weight, up, out, norm, bias, residual, activation, workspace, tuning, config):
        launch.run()


def launches(
    x: Tensor,
    weight: DeviceWeight,
    up: DeviceWeight | None,
    out: Tensor,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    workspace: LinearWorkspace | None = None,
    tuning: Tuning | None = None,
    config: LaunchConfig | None = None,
) -> Iterator[Launch]:
    """The kernels that make up a product of at most `MAX_ROWS` rows, in order."""
    rows, inputs = x.shape
    if not rows:
        return
    tuning = tuning or Tuning.of_machine(x.device)
    if config is None:
        kind = str(weight.dtype).removeprefix("torch.") if weight.kind == "dense" else weight.kind
        problem = Problem(weight.outputs, inputs, rows, kind, up is not None, weight.dtype)
        config = tuning.config(problem, _processors(x.device))
    interpreted = x.device.type == "cpu"
    pdl = tuning.pdl and not interpreted
    normed = None
    if norm is not None and workspace is not None and not config.fuse_norm:
        normed = workspace.rows(rows, inputs, weight.dtype)
    if norm is not None and normed is not None:
        yield Launch(
            norm_kernel,
            (rows,),
            (x, norm.gain, normed, x.stride(0), normed.stride(0), norm.epsilon),
            {"K": inputs, "ADDS_ONE": norm.adds_one, "BLOCK": triton.next_power_of_2(inputs), "PDL": pdl},
            warps=8 if inputs > 2048 else 4,
        )
        x, norm = normed, None
    second = weight if up is None else up
    first_scales = weight.values if weight.scales is None else weight.scales
    second_scales = second.values if second.scales is None else second.scales
    tensors = (
        x, weight.values, first_scales, second.values, second_scales,
        x if norm is None else norm.gain, x if bias is None else bias, out if residual is None else residual, out,
    )  # fmt: skip
    strides = (weight.values.stride(0), 0 if weight.scales is None else weight.scales.stride(0))
    epsilon = 0.0 if norm is None else norm.epsilon
    constants: dict[str, Any] = {
        "K": inputs, "GATED": up is not None, "HAS_NORM": norm is not None,
        "ADDS_ONE": norm is not None and norm.adds_one, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation or "", "BLOCK_N": config.block_n, "PDL": pdl,
    }  # fmt: skip
    tiles_n = triton.cdiv(weight.outputs, config.block_n)
    residual_stride = out.stride(0) if residual is None else residual.stride(0)
    if config.kernel == "whole_rows":
        if weight.kind != "dense" or inputs > config.block_k:
            raise RequestError(
                f"a launch of {config.block_k} dense inputs was chosen for {inputs} of {weight.kind}"
            )
        x, first, _, other, _, *rest = tensors
        yield Launch(
            whole_rows_kernel,
            (triton.cdiv(rows, config.block_m), tiles_n),
            (
                x, first, other, *rest, rows, weight.outputs, x.stride(0), strides[0], residual_stride, out.stride(0),
                epsilon,
            ),
            {
                **constants, "COMPUTE": _TRITON[weight.dtype], "BLOCK_M": config.block_m, "SLICES": config.slices,
                "SLICE": config.block_k // config.slices,
            },
            config.warps,
        )  # fmt: skip
        return
    constants |= {
        "KIND": _BITS[weight.kind], "BLOCK_K": config.block_k, "STAGES": config.stages, "LINES": config.lines,
        "PTX": "" if interpreted or not config.ptx else _PTX.get(weight.dtype, ""),
    }  # fmt: skip
    if config.kernel == "one_row":
        if rows != 1:
            raise RequestError(f"a one-row launch was chosen for {rows} rows")
        yield Launch(
            one_row_kernel,
            (tiles_n,),
            (*tensors, weight.outputs, *strides, epsilon),
            {**constants, "UNROLL": config.unroll},
            config.warps,
            config.stages,
        )
        return
    tiles = triton.cdiv(rows, config.block_m) * tiles_n
    share = config.block_n * config.block_m * (1 if up is None else 2) + config.block_m
    if workspace is None or tiles > len(workspace.arrived):
        config = replace(config, split_k=1)
    elif tiles * share * config.split_k > len(workspace.shares):
        config = replace(config, split_k=max(1, len(workspace.shares) // (tiles * share)))
    scratch = (out, out) if workspace is None else (workspace.shares, workspace.arrived)
    yield Launch(
        few_rows_kernel,
        (triton.cdiv(rows, config.block_m), tiles_n, config.split_k),
        (
            *tensors, *scratch, *_tiles(x, weight, second, config, norm is None), rows, weight.outputs, x.stride(0),
            *strides, residual_stride, out.stride(0), epsilon,
        ),
        {
            **constants, "COMPUTE": _TRITON[weight.dtype], "BLOCK_M": config.block_m, "SPLIT_K": config.split_k,
            "WRITTEN": config.written and weight.kind != "dense",
        },
        config.warps,
        config.stages,
    )  # fmt: skip


def _tiles(
    x: Tensor, first: DeviceWeight, second: DeviceWeight, config: LaunchConfig, plain: bool
) -> tuple[TensorDescriptor | None, TensorDescriptor | None, TensorDescriptor | None]:
    """Descriptors of x's and the weights' tiles for Hopper's copy engine, where it is to bring them and can."""
    sources = (x, first.values, second.values)
    able = config.tma and plain and first.kind == "dense" and x.dtype == first.dtype
    if not able or any(one.data_ptr() % 16 or one.stride(0) * one.element_size() % 16 for one in sources):
        return None, None, None
    heights = (config.block_m, config.block_n, config.block_n)
    made = [
        TensorDescriptor(one, list(one.shape), list(one.stride()), [height, config.block_k])
        for one, height in zip(sources, heights, strict=True)
    ]
    return made[0], made[1], made[2]


def _prefill(
    x: Tensor,
    weight: DeviceWeight,
    up: DeviceWeight | None,
    out: Tensor,
    norm: Norm | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    """Many rows: PyTorch's product, with quantised weights written out once."""
    values = (x if norm is None else _normed(x, norm)).to(weight.dtype)
    result = _activated(_product(values, weight, bias), activation)
    if up is not None:
        result *= _product(values, up, None)
    if residual is not None:
        result = result + residual
    out.copy_(result)


def _product(values: Tensor, weight: DeviceWeight, bias: Tensor | None) -> Tensor:
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
        {"K": weight.inputs, "KIND": _BITS[weight.kind], **blocks},
    ).run()  # fmt: skip
    return out


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count

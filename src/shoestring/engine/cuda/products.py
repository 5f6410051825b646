"""The kernels that make up a product of few rows: chosen by what was measured, with all that they are launched with."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from shoestring.engine.cuda.copied_tiles import can_be_copied, tiles_of, wide_tiles_of
from shoestring.engine.cuda.fragments_kernel import fragments_kernel
from shoestring.engine.cuda.linear_kernels import few_rows_kernel
from shoestring.engine.cuda.one_row_kernels import norm_kernel, one_row_kernel
from shoestring.engine.cuda.tuning import MAX_ROWS, LaunchConfig, Problem, Tuning, few_rows
from shoestring.engine.cuda.weights import GROUP, DeviceWeight
from shoestring.engine.cuda.whole_rows_kernel import whole_rows_kernel
from shoestring.engine.cuda.wide_tiles_kernel import wide_tiles_kernel
from shoestring.errors import RequestError

__all__ = [
    "KIND_BITS",
    "Launch",
    "LinearWorkspace",
    "Norm",
    "Product",
    "ScaledRows",
    "chosen",
    "launches",
    "left_by",
    "widest_left",
]

_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_PTX = {torch.bfloat16: "bf16", torch.float16: "fp16"}
KIND_BITS = {"dense": 0, "int8": 8, "int4": 4}
"""Bits of a quantised weight, 0 for dense ones: what kernels call KIND."""
_MOST_PARTS = 256


def widest_left(rows: int) -> int:
    """Wider rows are normalised by a kernel in front of the product: a small part of its time, and so measured.

    One row's few sums of squares are soon read.
    """
    return 4096 if rows == 1 else 2048


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
class ScaledRows:
    """What a product left for the RMSNorm behind it: rows with the norm's gain, not yet divided by their sizes."""

    values: Float[Tensor, "M K"]
    """In the type that products are computed in."""
    squares: Float[Tensor, "parts M"]
    """The sums of squares of the rows' parts (without the gain), float32."""


@dataclass(frozen=True)
class LinearWorkspace:
    """Room for shares of split sums, and for rows on their way through a norm; one serves all products of a stream, one
    after another.
    """

    shares: Tensor
    arrived: Tensor
    normed: Tensor
    squares: Tensor

    @classmethod
    def allocate(
        cls, device: torch.device | str, *, width: int, shares: int = 1 << 23, tiles: int = 1 << 12
    ) -> "LinearWorkspace":
        """Room for inputs at most `width` wide; a split that would need more than `shares` floats is not made."""
        return cls(
            torch.zeros(shares, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
            torch.zeros(MAX_ROWS * width * 2, dtype=torch.float16, device=device),
            torch.zeros(_MOST_PARTS, MAX_ROWS, dtype=torch.float32, device=device),
        )

    def rows(self, count: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Room for rows [count, width]; None where it is too small."""
        room = self.normed.view(dtype)
        return room[: count * width].view(count, width) if count * width <= len(room) else None


@dataclass(frozen=True)
class Product:
    """`activation(norm(x) W^T + bias) + residual`, or `activation(norm(x) W^T) * (norm(x) up^T)`, into `out`.

    Args:
        scaled: what an earlier product left for `norm`, where it did.
        next_norm: the norm behind this product, to leave its rows for.
    """

    x: Float[Tensor, "M K"]
    weight: DeviceWeight
    up: DeviceWeight | None
    out: Float[Tensor, "M N"]
    norm: Norm | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None
    scaled: ScaledRows | None = None
    next_norm: Norm | None = None

    @property
    def problem(self) -> Problem:
        """What configurations are kept for."""
        weight = self.weight
        kind = str(weight.dtype).removeprefix("torch.") if weight.kind == "dense" else weight.kind
        return Problem(weight.outputs, weight.inputs, len(self.x), kind, self.up is not None, weight.dtype)


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    registers: int = 0

    def run(self) -> None:
        """Put it on the current stream."""
        self.kernel[self.grid](*self.arguments, **self._options())

    def compile(self) -> None:
        """Compile it, without a run (inside `triton.AsyncCompileMode`: in the background)."""
        self.kernel.warmup(*self.arguments, grid=self.grid, **self._options())

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        if self.constants.get("PDL"):
            options["launch_pdl"] = True
        if self.registers:
            options["maxnreg"] = self.registers
        return {**self.constants, **options}


def chosen(product: Product, workspace: LinearWorkspace | None, tuning: Tuning) -> LaunchConfig:
    """How it is launched by what was measured, or, where these rows are not laid out for that, by what takes any."""
    processors = _processors(product.x.device)
    found = tuning.config(product.problem, processors)
    able = {"fragments": _in_words, "wide_tiles": _in_tiles}.get(found.kernel)
    return few_rows(product.problem, processors) if able and not able(product, workspace) else found


def _in_words(product: Product, workspace: LinearWorkspace | None) -> bool:
    """Whether rows can be read two numbers at a time: of the computing type, as a norm in front leaves them; aligned."""
    x, dtype = product.x, product.weight.dtype
    if dtype not in _PTX:
        return False
    if product.norm is not None:
        return product.scaled is not None or (
            workspace is not None and workspace.rows(len(x), x.shape[1], dtype) is not None
        )
    return x.dtype == dtype and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0


def _in_tiles(product: Product, workspace: LinearWorkspace | None) -> bool:
    """Whether the copy engine can bring the rows as well as the weights."""
    x, weight, up = product.x, product.weight, product.up
    if product.norm is not None:
        if product.scaled is not None:
            x = product.scaled.values
        else:
            room = None if workspace is None else workspace.rows(len(x), x.shape[1], weight.dtype)
            if room is None:
                return False
            x = room
    return (
        weight.kind == "dense"
        and x.dtype == weight.dtype
        and can_be_copied(x, weight.values, *([up.values] if up else ()))
    )


def left_by(product: Product, config: LaunchConfig, workspace: LinearWorkspace | None) -> ScaledRows | None:
    """Where the product leaves its rows for the norm behind it; None where it does not."""
    rows, width = product.out.shape
    if (
        product.next_norm is None
        or width > widest_left(rows)
        or workspace is None
        or config.kernel in ("one_row", "wide_tiles")
    ):
        return None
    if product.norm is not None:
        return None  # what it reads may lie where it would leave its own
    parts, room = triton.cdiv(width, config.block_n), workspace.rows(rows, width, product.weight.dtype)
    if room is None or parts > len(workspace.squares):
        return None
    return ScaledRows(room, workspace.squares[:parts, :rows])


def launches(
    product: Product, workspace: LinearWorkspace | None, tuning: Tuning, config: LaunchConfig | None = None
) -> Iterator[Launch]:
    """The kernels that make up a product of at most `MAX_ROWS` rows, in order."""
    x, weight, up, out, norm = product.x, product.weight, product.up, product.out, product.norm
    rows, inputs = x.shape
    if not rows:
        return
    config = config or chosen(product, workspace, tuning)
    if rows != 1 and (config.kernel == "one_row" or (config.kernel == "fragments" and config.block_m == 1)):
        raise RequestError(f"a one-row launch was chosen for {rows} rows")
    if config.kernel == "whole_rows" and (weight.kind != "dense" or inputs > config.block_k + config.tail):
        raise RequestError(
            f"a launch of {config.block_k + config.tail} dense inputs was chosen for {inputs} of {weight.kind}"
        )
    if config.kernel == "fragments" and (weight.kind == "dense" or not _in_words(product, workspace)):
        raise RequestError(
            f"a launch of integers and {weight.dtype} rows was chosen for {weight.kind} weights and rows of {x.dtype}"
        )
    if config.kernel == "wide_tiles" and not _in_tiles(product, workspace):
        raise RequestError(
            f"a launch of rows and dense weights that the copy engine takes was chosen for {weight.kind} weights and "
            f"rows of {x.dtype} with a stride of {x.stride(0)}"
        )
    interpreted = x.device.type == "cpu"
    pdl = tuning.pdl and not interpreted
    epsilon = 0.0 if norm is None else norm.epsilon
    scaled = None if norm is None or config.kernel == "one_row" else product.scaled
    if scaled is not None:
        x, norm = scaled.values, None
    elif (
        norm is not None and workspace is not None and not (config.fuse_norm and config.kernel != "fragments")
    ):
        normed = workspace.rows(rows, inputs, weight.dtype)
        if normed is not None:
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
    gain = x if norm is None else norm.gain
    bias = x if product.bias is None else product.bias
    residual = out if product.residual is None else product.residual
    scales_stride = 0 if weight.scales is None else weight.scales.stride(0)
    constants: dict[str, Any] = {
        "K": inputs, "GATED": up is not None, "HAS_NORM": norm is not None,
        "ADDS_ONE": norm is not None and norm.adds_one, "HAS_BIAS": product.bias is not None,
        "HAS_RESIDUAL": product.residual is not None, "ACTIVATION": product.activation or "",
        "BLOCK_N": config.block_n, "PDL": pdl,
    }  # fmt: skip
    streaming: dict[str, Any] = {
        "KIND": KIND_BITS[weight.kind], "BLOCK_K": config.block_k, "STAGES": config.stages, "LINES": config.lines,
        "PTX": "" if interpreted or not config.ptx else _PTX.get(weight.dtype, ""),
    }  # fmt: skip
    tiles_n = triton.cdiv(weight.outputs, config.width)
    if config.kernel == "one_row":
        yield Launch(
            one_row_kernel,
            (tiles_n,),
            (
                x, weight.values, first_scales, second.values, second_scales, gain, bias, residual, out,
                weight.outputs, weight.values.stride(0), scales_stride, epsilon,
            ),
            {**constants, **streaming, "UNROLL": config.unroll},
            config.warps,
            config.stages,
        )  # fmt: skip
        return
    left, next_norm = left_by(product, config, workspace), product.next_norm
    parts = 0 if scaled is None else len(scaled.squares)
    squares = scaled.squares if scaled is not None else left.squares if left is not None else None
    constants |= {
        "COMPUTE": _TRITON[weight.dtype], "LATE": config.late, "BLOCK_M": config.block_m, "PARTS": parts,
        "MOST_PARTS": triton.next_power_of_2(max(parts, 1)), "LEAVES": left is not None,
        "NEXT_ADDS_ONE": left is not None and next_norm is not None and next_norm.adds_one,
    }  # fmt: skip
    around = (
        gain, x if scaled is None else scaled.squares, bias, residual, out,
        gain if left is None or next_norm is None else next_norm.gain, out if left is None else left.values,
        out if left is None else left.squares,
    )  # fmt: skip
    strides = (
        residual.stride(0), out.stride(0), 0 if left is None else left.values.stride(0),
        0 if squares is None else squares.stride(0), epsilon,
    )  # fmt: skip
    tiles_m = triton.cdiv(rows, config.block_m)
    if config.kernel == "fragments":
        yield Launch(
            fragments_kernel,
            (tiles_m, tiles_n),
            (
                x, weight.values, first_scales, second.values, second_scales, *around[1:], rows, weight.outputs,
                x.stride(0), weight.values.stride(0), scales_stride, *strides,
            ),
            {
                **_taken(fragments_kernel, constants | streaming), "TILES": config.block_n // 16,
                "CHUNKS": config.block_k // (2 * GROUP * config.warps), "WARPS": config.warps,
                "WHOLE": weight.outputs % config.block_n == 0, "UNROLL": max(1, config.unroll),
                "AHEAD": config.stages > 1,
            },
            config.warps,
            registers=config.registers,
        )  # fmt: skip
        return
    if config.kernel == "wide_tiles":
        config = _split_within(config, workspace, tiles_m * tiles_n, up)
        scratch = (out, out) if workspace is None else (workspace.shares, workspace.arrived)
        x_tiles, *tiles = wide_tiles_of(x, weight, second, config)
        yield Launch(
            wide_tiles_kernel,
            (tiles_m, tiles_n, config.split_k),
            (
                x_tiles, weight.values, second.values, *tiles, *around[1:5], *scratch, rows, weight.outputs,
                weight.values.stride(0), strides[0], strides[1], *strides[3:],
            ),
            {
                **_taken(wide_tiles_kernel, constants | streaming), "TAIL": config.tail, "SPLIT_K": config.split_k,
            },
            config.warps,
            config.stages,
            config.registers,
        )  # fmt: skip
        return
    if config.kernel == "whole_rows":
        yield Launch(
            whole_rows_kernel,
            (tiles_m, tiles_n),
            (
                x, weight.values, second.values, *around, rows, weight.outputs, x.stride(0), weight.values.stride(0),
                *strides,
            ),
            {
                **constants, "SLICES": config.slices, "SLICE": config.block_k // config.slices,
                "TAIL": config.tail // config.slices,
            },
            config.warps,
        )  # fmt: skip
        return
    config = _split_within(config, workspace, tiles_m * tiles_n, up)
    scratch = (out, out) if workspace is None else (workspace.shares, workspace.arrived)
    yield Launch(
        few_rows_kernel,
        (tiles_m, tiles_n, config.split_k),
        (
            x, weight.values, first_scales, second.values, second_scales, *around, *scratch,
            *tiles_of(x, weight, second, config, norm is None), rows, weight.outputs, x.stride(0),
            weight.values.stride(0), scales_stride, *strides,
        ),
        {
            **constants, **streaming, "SPLIT_K": config.split_k,
            "WRITTEN": config.written and weight.kind != "dense",
        },
        config.warps,
        config.stages,
        config.registers,
    )  # fmt: skip


def _taken(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Those that the kernel knows."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def _split_within(
    config: LaunchConfig, workspace: LinearWorkspace | None, tiles: int, up: DeviceWeight | None
) -> LaunchConfig:
    """The launch, with no more shares than there is room for."""
    if workspace is None or tiles > len(workspace.arrived):
        return replace(config, split_k=1)
    share = config.block_m * (config.width * (1 if up is None else 2) + 1)
    most = max(1, len(workspace.shares) // (tiles * share))
    return config if config.split_k <= most else replace(config, split_k=most)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count

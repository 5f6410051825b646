"""Float weights on the int8 and int4 grids in plain PyTorch, on any device: w = d * q in int8, w = d * q + m in int4.

d and m are float16, one a row and group of 32 inputs. The numbers are those of native/quantized_pack.cpp, by the same
search in the same order of operations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shoestring.errors import RequestError
from shoestring.quantization.formats import check_quantize

__all__ = ["GROUP", "Grid", "blocks_on_grid", "grid_of_blocks", "levels_on", "round_to_nearest"]

GROUP = 32
"""Inputs that share a scale."""


@dataclass(frozen=True)
class Grid:
    """A matrix W [N, K] (N outputs, K inputs) as integers and their scales.

    Args:
        quantize: "int8" or "int4".
        levels: [N, K] integers: int8 of -127..127, or uint8 of 0..15.
        scales: [N, K / 32] float16.
        minima: [N, K / 32] float16 in int4, None in int8.
    """

    quantize: str
    levels: Int[Tensor, "N K"]
    scales: Float[Tensor, "N groups"]
    minima: Float[Tensor, "N groups"] | None = None

    def dense(self) -> Float[Tensor, "N K"]:
        """The weights that it stands for, in float32."""
        values = self.levels.unflatten(1, (-1, GROUP)).float() * self.scales.float()[:, :, None]
        if self.minima is not None:
            values = values + self.minima.float()[:, :, None]
        return values.flatten(1)


def round_to_nearest(weight: Float[Tensor, "N K"], quantize: str, *, clip: bool = True) -> Grid:
    """Each weight rounded to the nearest value of its group's grid, by itself.

    Args:
        clip: in int4, search for the grid of least squared error (what `pack` does), which may leave a group's extremes
            outside; else the grid spans the group, from its minimum to its maximum. int8 always spans it.

    Raises:
        RequestError: an unknown `quantize`, no matrix, or a width that is no multiple of 32.
    """
    check_matrix(weight, quantize)
    levels, scales, *minima = blocks_on_grid(weight.detach().float(), quantize, clip=clip)
    return Grid(quantize, levels.flatten(1), scales, minima[0] if minima else None)


def check_matrix(weight: Tensor, quantize: str | None) -> None:
    """Raise RequestError unless `weight` [N, K] can lie on a grid of this kind."""
    if check_quantize(quantize) is None:
        raise RequestError("quantize None has no grid: int8 or int4")
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        raise RequestError(
            f"a weight of shape {list(weight.shape)} has no grid: [outputs, inputs], inputs a multiple of {GROUP}"
        )


def blocks_on_grid(weight: Float[Tensor, "n K"], quantize: str, *, clip: bool = True) -> tuple[Tensor, ...]:
    """Integers [n, groups, 32], scales and (int4) minima [n, groups] in float16, of a float32 weight."""
    blocks = weight.unflatten(1, (-1, GROUP))
    scales, minima = grid_of_blocks(blocks, quantize, clip=clip)
    levels = levels_on(blocks, scales[:, :, None], None if minima is None else minima[:, :, None])
    if minima is None:
        return levels.to(torch.int8), scales.to(torch.float16)
    return levels.to(torch.uint8), scales.half(), minima.half()


def grid_of_blocks(
    blocks: Float[Tensor, "n groups 32"], quantize: str, *, clip: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scales and (int4) minima [n, groups], as float32 of float16 values."""
    if quantize == "int8":
        return _half(blocks.abs().amax(2) / 127), None
    return _best_grid(blocks) if clip else _spanning_grid(blocks)


def levels_on(values: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """The nearest levels, as float32: of 0..15 where there is a minimum, else of -127..127. Shapes broadcast."""
    if minimum is None:
        return (values * _inverse(scale)).clamp(-127, 127).round()
    return (((values - minimum) * _inverse(scale)).clamp(0.0, 15.0) + 0.5).floor()


def _half(values: Tensor) -> Tensor:
    """Rounded to float16, the largest finite one beyond its range; as float32."""
    return values.clamp(-65504.0, 65504.0).half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def _total(values: Tensor) -> Tensor:
    """The sum over 32 as the CPU takes it: eight lanes, then their tree. Near ties are decided alike."""
    parts = values.unflatten(2, (4, 8)).unbind(2)
    lanes = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    pairs = lanes[..., 0::2] + lanes[..., 1::2]
    fours = pairs[..., 0::2] + pairs[..., 1::2]
    return fours[..., 0] + fours[..., 1]


def _error(blocks: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    level = levels_on(blocks, scale[:, :, None], minimum[:, :, None])
    return _total((minimum[:, :, None] + scale[:, :, None] * level - blocks).square())


def _spanning_grid(blocks: Tensor) -> tuple[Tensor, Tensor]:
    low, high = blocks.amin(2), blocks.amax(2)
    return _half((high - low) / 15), _half(low)


def _best_grid(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of least squared error: ranges a little narrower and wider than the block's own, each refitted."""
    low, high = blocks.amin(2), blocks.amax(2)
    spread = high - low
    best = list(_spanning_grid(blocks))
    least = _error(blocks, *best)
    trials = 6
    sums = _total(blocks)
    for trial in range(trials):
        levels = 13.0 + 3.0 * trial / (trials - 1)
        scale = spread / torch.tensor(levels, dtype=torch.float32, device=blocks.device)
        minimum = low + (spread - 15 * scale) / 2
        for _ in range(2):
            level = levels_on(blocks, scale[:, :, None], minimum[:, :, None])
            sum_q = _total(level)
            determinant = GROUP * _total(level * level) - sum_q * sum_q
            fitted = (GROUP * _total(level * blocks) - sum_q * sums) / determinant
            lowest = (sums - fitted * sum_q) / GROUP
            scale = _half(torch.where(determinant > 0, fitted, scale).clamp(min=0.0))
            minimum = _half(torch.where(determinant > 0, lowest, minimum))
            error = _error(blocks, scale, minimum)
            better = (error < least) & (spread > 0)
            best = [torch.where(better, new, old) for new, old in zip((scale, minimum), best, strict=True)]
            least = torch.where(better, error, least)
    return best[0], best[1]

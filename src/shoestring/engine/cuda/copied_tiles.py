"""What Hopper's copy engine brings to a product: descriptors of its tiles, and whether it can."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from shoestring.engine.cuda.tuning import LaunchConfig
from shoestring.engine.cuda.weights import GROUP, DeviceWeight

__all__ = ["can_be_copied", "tiles_of", "wide_tiles_of"]


def can_be_copied(*matrices: Tensor) -> bool:
    """Whether the engine takes tiles of all of them: it wants addresses in multiples of 16 bytes."""
    return not any(one.data_ptr() % 16 or one.stride(0) * one.element_size() % 16 for one in matrices)


def tiles_of(
    x: Tensor, first: DeviceWeight, second: DeviceWeight, config: LaunchConfig, plain: bool
) -> tuple[TensorDescriptor | None, TensorDescriptor | None, TensorDescriptor | None]:
    """x's tiles and those of dense weights, where the engine is to bring them and can; `plain`: x needs no norm."""
    dense = first.kind == "dense"
    sources = (x, first.values, second.values) if dense else (x,)
    able = config.tma and plain and x.dtype == first.dtype and (dense or config.written)
    if not able or not can_be_copied(*sources):
        return None, None, None
    if not dense:  # rows alone: what ordinary loads bring would hold the tensor cores up at a fence
        return _descriptor(x, config.block_m, 2 * GROUP), None, None
    heights = (config.block_m, config.block_n, config.block_n)
    made = [_descriptor(one, height, config.block_k) for one, height in zip(sources, heights, strict=True)]
    return made[0], made[1], made[2]


def wide_tiles_of(
    x: Tensor, first: DeviceWeight, second: DeviceWeight, config: LaunchConfig
) -> list[TensorDescriptor | None]:
    """x's tiles, and of each matrix those in front and the tails; None where there are no tails."""
    found: list[TensorDescriptor | None] = [_descriptor(x, config.block_m, config.block_k)]
    for weight in (first, second):
        for height in (config.block_n, config.tail):
            found.append(_descriptor(weight.values, height, config.block_k) if height else None)
    return found


def _descriptor(matrix: Tensor, height: int, width: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [height, width])

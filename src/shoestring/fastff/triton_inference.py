"""Fast feedforward inference on a GPU: walk the paths (small batches), group tokens by subtree (large ones), choose.

Tensors: x (..., E), w_in (K, n, E), b_in (K, n) or None, w_out (K, n, O), n = 2^(depth + 1) - 1 nodes of K trees;
y (..., O). fp32, bf16 or fp16, all but b_in alike; sums are in fp32 and in the same order on every run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shoestring.errors import RequestError
from shoestring.fastff import triton_kernels as kernels
from shoestring.fastff.functional import ACTIVATIONS, activation_function, masked
from shoestring.fastff.triton_reach import DTYPES, MAX_GROUPED_LEVELS

__all__ = [
    "Groups",
    "Plan",
    "Shape",
    "block_of",
    "choose",
    "forward",
    "group",
    "grouped",
    "infer",
    "kind_of",
    "path",
    "power_of_two",
    "shape_of",
]


@dataclass(frozen=True)
class Plan:
    """How a batch goes through the layer: `path` (with its levels per step), `grouped`, or `masked` (dense)."""

    kind: Literal["path", "grouped", "masked"]
    levels_per_step: int = 1


class Shape(NamedTuple):
    """A layer's sizes, and how its levels are split for grouping: `top` (2^top groups) and `low` ones."""

    tokens: int
    trees: int
    width_in: int
    width_out: int
    levels: int
    top: int
    low: int
    tile: int  # tokens of a tile
    columns: int  # of a group: its subtree and its ancestors, padded

    @property
    def groups(self) -> int:
        """Subtrees that tokens are grouped by."""
        return 2**self.top

    @property
    def tiles(self) -> int:
        """As many tiles as any routing needs: each group's last one may be short."""
        return -(-self.tokens // self.tile) + self.groups - 1


class Groups(NamedTuple):
    """Tokens sorted by subtree, for each tree: `order` (K, T), the groups' first places `starts` (K, groups + 1)."""

    order: Int[Tensor, "K T"]
    starts: Int[Tensor, "K G"]


# Measured on an H100 by benchmarks/fast_feedforward_gpu.py, whose `chosen_over_best` says what they cost.
_WALK_LIMIT = 3.2  # rows that walking reads, of the layer's own, above which it is slower than grouping
_NARROW_WALK_LIMIT = 13.0  # the same for rows of at most 2 KB, most of which the L2 cache holds
_FEW_PROGRAMS = 128  # as many as processors: programs that wait for memory alone


def choose(batch: int, width: int, depth: int, dtype: torch.dtype, trees: int = 1) -> Plan:
    """Choose the way for `batch` tokens: by the bytes that walking reads against the layer's own.

    A walk reads depth + 1 rows of both matrices per token, grouping the whole layer once. Few programs wait for
    memory, so they read two levels at a time.
    """
    levels = depth + 1
    limit = _NARROW_WALK_LIMIT if width * dtype.itemsize <= 2048 else _WALK_LIMIT
    if levels <= 5 and trees > 4:  # hardly a neuron is saved, and cuBLAS is faster at the same work
        return Plan("masked")
    if levels <= MAX_GROUPED_LEVELS and batch >= 16 and batch * levels > limit * (2**levels - 1):
        return Plan("grouped")
    if batch * trees <= _FEW_PROGRAMS:
        return Plan("path", 2)
    return Plan("path", 1)


def infer(
    x: Float[Tensor, "*B E"],
    w_in: Float[Tensor, "K n E"],
    b_in: Float[Tensor, "K n"] | None,
    w_out: Float[Tensor, "K n O"],
    activation: str = "gelu",
    plan: Plan | None = None,
) -> Float[Tensor, "*B O"]:
    """Evaluate the layer without gradients, by `plan` or as `choose` says.

    Raises: RequestError where shapes or types don't fit, or a grouped plan meets more than 15 levels.
    """
    if plan is None:
        depth = (w_in.shape[1] + 1).bit_length() - 2
        plan = choose(x[..., 0].numel(), x.shape[-1], depth, x.dtype, w_in.shape[0])
    if plan.kind == "grouped":
        return grouped(x, w_in, b_in, w_out, activation)
    if plan.kind == "path":
        return path(x, w_in, b_in, w_out, activation, levels_per_step=plan.levels_per_step)
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        return masked(rows, w_in, b_in, w_out, activation).reshape(*x.shape[:-1], w_out.shape[2])


@torch.no_grad()
def path(
    x: Float[Tensor, "*B E"],
    w_in: Float[Tensor, "K n E"],
    b_in: Float[Tensor, "K n"] | None,
    w_out: Float[Tensor, "K n O"],
    activation: str = "gelu",
    levels_per_step: int = 1,
) -> Float[Tensor, "*B O"]:
    """Evaluate by one program a token and tree, which reads the 2^levels_per_step - 1 rows of each step together.

    Raises: RequestError where shapes or types don't fit.
    """
    shape = shape_of(x, w_in, b_in, w_out)
    rows_in = x.reshape(shape.tokens, shape.width_in).contiguous()
    step = min(levels_per_step, shape.levels)
    rows = 1 if step == 1 else 2**step
    block_in = min(power_of_two(shape.width_in), 32768 // rows)
    warps = min(max(rows * block_in // 1024, 1), 16)
    path_size = max(2, power_of_two(shape.levels))
    block_out = min(power_of_two(shape.width_out), max(64 * 32 * warps // path_size, 32))
    # One tree's sum is the result; the sums of several are added in fp32.
    dtype = x.dtype if shape.trees == 1 else torch.float32
    y = torch.empty(shape.trees, shape.tokens, shape.width_out, dtype=dtype, device=x.device)
    kernels.launch(
        kernels.path_kernel, (shape.tokens, shape.trees),
        rows_in, w_in.contiguous(), _contiguous(b_in), w_out.contiguous(), y, shape.tokens,
        E=shape.width_in, O=shape.width_out, LEVELS=shape.levels, STEP=step, ROWS=rows, PATH=path_size,
        BLOCK_E=block_in, BLOCK_O=block_out, BIAS=b_in is not None, KIND=kind_of(activation), warps=warps,
    )  # fmt: skip
    total = y[0] if shape.trees == 1 else y.sum(0).to(x.dtype)
    return total.reshape(*x.shape[:-1], shape.width_out)


@torch.no_grad()
def grouped(
    x: Float[Tensor, "*B E"],
    w_in: Float[Tensor, "K n E"],
    b_in: Float[Tensor, "K n"] | None,
    w_out: Float[Tensor, "K n O"],
    activation: str = "gelu",
) -> Float[Tensor, "*B O"]:
    """Evaluate by tiles of tokens that reach the same subtree.

    Raises: RequestError where shapes or types don't fit, or the trees have more than 15 levels.
    """
    shape = shape_of(x, w_in, b_in, w_out, grouping=True)
    rows = x.reshape(shape.tokens, shape.width_in).contiguous()
    w_in, b_in, w_out = w_in.contiguous(), _contiguous(b_in), w_out.contiguous()
    y = forward(shape, rows, w_in, b_in, w_out, group(shape, rows, w_in, b_in), activation)[0]
    return y.reshape(*x.shape[:-1], shape.width_out)


def shape_of(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, grouping: bool = False) -> Shape:
    """Check the tensors against each other and derive the layer's sizes.

    Raises: RequestError with the shapes, types or devices that don't fit.
    """
    tensors = [x, w_in, w_out] + ([b_in] if b_in is not None else [])
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    nodes = w_in.shape[1] if w_in.ndim == 3 else 0
    if (
        x.ndim < 1 or w_out.ndim != 3 or w_out.shape[:2] != w_in.shape[:2] or w_in.shape[2] != x.shape[-1]
        or nodes < 1 or nodes & (nodes + 1) or (b_in is not None and b_in.shape != w_in.shape[:2])
    ):  # fmt: skip
        raise RequestError(
            f"x (..., E), w_in (K, n, E), w_out (K, n, O), b_in (K, n) with n = 2^levels - 1 don't fit: {shapes}"
        )
    types = {tensor.dtype for tensor in tensors[:3]}
    if len(types) > 1 or not types <= set(DTYPES):
        raise RequestError(
            f"x, w_in and w_out must all be float32, bfloat16 or float16, not {sorted(map(str, types))}"
        )
    if len({tensor.device for tensor in tensors}) > 1:
        raise RequestError(
            f"tensors on several devices: {sorted({str(tensor.device) for tensor in tensors})}"
        )
    levels = nodes.bit_length()
    if grouping and levels > MAX_GROUPED_LEVELS:
        raise RequestError(f"grouping takes at most {MAX_GROUPED_LEVELS} levels, not {levels}: use path")
    top = min(max(levels - 5, 0), 8)
    low = levels - top
    columns = max(16, power_of_two(2**low - 1 + top))
    tokens = x[..., 0].numel()
    each = tokens / 2**top
    tile = 16 if each <= 24 else 32 if each <= 48 or columns > 128 else 64
    return Shape(tokens, w_in.shape[0], x.shape[-1], w_out.shape[2], levels, top, low, tile, columns)


def group(shape: Shape, x: Tensor, w_in: Tensor, b_in: Tensor | None) -> Groups:
    """Route tokens (T, E) through the top levels of each tree and sort them by the subtree they reach."""
    if shape.top == 0:
        order = torch.arange(shape.tokens, dtype=torch.int32, device=x.device).expand(shape.trees, -1)
        starts = torch.zeros(shape.trees, 2, dtype=torch.int32, device=x.device)
        starts[:, 1] = shape.tokens
        return Groups(order.contiguous(), starts)
    integers = partial(torch.empty, dtype=torch.int32, device=x.device)
    tile = 16 if shape.tokens <= 2048 else 32 if shape.tokens <= 8192 else 64
    tiles = -(-shape.tokens // tile)
    reached = integers(shape.trees, shape.tokens)
    counts = integers(shape.trees, tiles, shape.groups)
    order = integers(shape.trees, shape.tokens)
    starts = integers(shape.trees, shape.groups + 1)
    kernels.launch(
        kernels.route_kernel, (tiles, shape.trees), x, w_in, b_in, reached, counts, shape.tokens,
        E=shape.width_in, LEVELS=shape.levels, TOP=shape.top, TILE=tile, COLUMNS=max(16, shape.groups),
        BLOCK_E=block_of(shape.width_in, x.dtype), BIAS=b_in is not None, PRECISION="ieee",
        warps=8 if shape.groups * tile > 4096 else 4,
    )  # fmt: skip
    kernels.launch(
        kernels.count_kernel, (shape.trees,), counts, starts, tiles,
        GROUPS=shape.groups, TILES=max(4096 // shape.groups, 1),
    )  # fmt: skip
    kernels.launch(
        kernels.place_kernel, (tiles, shape.trees), reached, counts, starts, order, shape.tokens,
        GROUPS=shape.groups, TILE=tile,
    )  # fmt: skip
    return Groups(order, starts)


def forward(
    shape: Shape,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    groups: Groups,
    activation: str,
    save: bool = False,
) -> tuple[Float[Tensor, "T O"], Int[Tensor, "K T"], Float[Tensor, "K T levels"]]:
    """y of grouped tokens; with `save` also each token's leaf (numbered in its subtree's heap) and logits z."""
    dtype = x.dtype if shape.trees == 1 else torch.float32
    y = torch.empty(shape.tokens, shape.width_out, dtype=dtype, device=x.device)
    saved = shape.tokens if save else 0
    leaf = torch.empty(shape.trees, saved, dtype=torch.int32, device=x.device)
    z = torch.empty(shape.trees, saved, shape.levels, dtype=torch.float32, device=x.device)
    for tree in range(shape.trees):
        kernels.launch(
            kernels.group_forward_kernel, (shape.tiles if shape.tokens else 0,),
            x, w_in[tree], None if b_in is None else b_in[tree], w_out[tree],
            groups.order[tree], groups.starts[tree], y, leaf[tree], z[tree],
            E=shape.width_in, O=shape.width_out, TOP=shape.top, LOW=shape.low, TILE=shape.tile,
            COLUMNS=shape.columns, BLOCK_E=block_of(shape.width_in, x.dtype),
            BLOCK_O=block_of(shape.width_out, x.dtype), BIAS=b_in is not None, ADD=tree > 0, SAVE=save,
            PRECISION="ieee", KIND=kind_of(activation), warps=8 if shape.tile * shape.columns > 4096 else 4,
        )  # fmt: skip
    return y.to(x.dtype), leaf, z


def kind_of(activation: str) -> int:
    """The kernels' number of an activation.

    Raises: RequestError where there is none of that name.
    """
    activation_function(activation)
    return ACTIVATIONS[activation]


def block_of(width: int, dtype: torch.dtype) -> int:
    """Columns of a product's inner block: 128 bytes of a row, twice that in half precision where the width has it."""
    return min(max(power_of_two(width), 16), 32 if dtype == torch.float32 else 64)


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()

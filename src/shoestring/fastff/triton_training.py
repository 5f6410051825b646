"""Fast feedforward training on a GPU: forward and backward that touch only the paths, as custom operators.

Tokens are grouped by subtree as in `triton_inference`; the forward pass keeps each token's leaf and logits. Backward
does a tile of one subtree at a time: dz = (dy . w_out) gelu'(z) on the path, dx = dz w_in. A weight's gradient sums over
its group's tokens in order, an ancestor's over the groups below it: no atomics, the same bits on every run.
Routing has no gradient of its own (arXiv 2311.10770, section 3): the hyperplane is the neuron.
"""

# ruff: noqa: E741, N803, N806
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations  # annotations as text: they name Triton, which may be absent

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from shoestring.fastff.triton_inference import (
    Groups,
    Shape,
    block_of,
    forward,
    group,
    kind_of,
    power_of_two,
    shape_of,
)
from shoestring.fastff.triton_kernels import (
    activate,
    columns_of_group,
    jit,
    launch,
    on_path,
    slope,
    tile_of_group,
)

try:
    import triton.language as tl
except ImportError:  # a CPU-only PyTorch
    tl = None

__all__ = ["apply"]


def apply(
    x: Float[Tensor, "*B E"],
    w_in: Float[Tensor, "K n E"],
    b_in: Float[Tensor, "K n"] | None,
    w_out: Float[Tensor, "K n O"],
    activation: str = "gelu",
) -> Float[Tensor, "*B O"]:
    """Evaluate the layer with gradients of all arguments; under autocast in its type, with fp32 sums.

    Raises: RequestError where shapes or types don't fit, or the trees have more than 15 levels.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    shape_of(x, w_in, b_in, w_out, grouping=True)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if b_in is None else b_in.contiguous()
    y = _forward(rows, w_in.contiguous(), bias, w_out.contiguous(), activation)[0]
    return y.reshape(*x.shape[:-1], w_out.shape[2])


@torch.library.custom_op("shoestring::fast_feedforward", mutates_args=())
def _forward(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = shape_of(x, w_in, b_in, w_out, grouping=True)
    groups = group(shape, x, w_in, b_in)
    y, leaf, z = forward(shape, x, w_in, b_in, w_out, groups, activation, save=True)
    return y, leaf, z, groups.order, groups.starts


@_forward.register_fake
def _(x, w_in, b_in, w_out, activation):
    tokens, (trees, nodes, _) = x.shape[0], w_in.shape
    levels = nodes.bit_length()
    groups = 2 ** min(max(levels - 5, 0), 8)
    integers = {"dtype": torch.int32}
    return (
        x.new_empty(tokens, w_out.shape[2]),
        x.new_empty(trees, tokens, **integers),
        x.new_empty(trees, tokens, levels, dtype=torch.float32),
        x.new_empty(trees, tokens, **integers),
        x.new_empty(trees, groups + 1, **integers),
    )


@torch.library.custom_op("shoestring::fast_feedforward_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    leaf: torch.Tensor,
    z: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = shape_of(x, w_in, b_in, w_out, grouping=True)
    grad = grad.contiguous()
    dx = torch.empty_like(x, dtype=x.dtype if shape.trees == 1 else torch.float32)
    dz = torch.empty_like(z)
    for tree in range(shape.trees):
        launch(
            group_backward_kernel, (shape.tiles if shape.tokens else 0,),
            grad, w_in[tree], w_out[tree], order[tree], starts[tree], leaf[tree], z[tree], dz[tree], dx,
            E=shape.width_in, O=shape.width_out, TOP=shape.top, LOW=shape.low, TILE=shape.tile,
            COLUMNS=shape.columns, BLOCK_E=block_of(shape.width_in, x.dtype),
            BLOCK_O=block_of(shape.width_out, x.dtype), ADD=tree > 0, PRECISION="ieee", KIND=kind_of(activation),
            warps=8 if shape.tile * shape.columns > 4096 else 4,
        )  # fmt: skip
    groups = Groups(order, starts)
    dw_in, db = weight_gradient(
        shape, x, dz, leaf, groups, w_in.dtype, None, None if b_in is None else b_in.dtype
    )
    dw_out, _ = weight_gradient(shape, grad, z, leaf, groups, w_out.dtype, activation, None)
    return dx.to(x.dtype), dw_in, db, dw_out


@_backward.register_fake
def _(grad, x, w_in, b_in, w_out, leaf, z, order, starts, activation):
    db = x.new_empty(0) if b_in is None else torch.empty_like(b_in)
    return torch.empty_like(x), torch.empty_like(w_in), db, torch.empty_like(w_out)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.activation = inputs[4]
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, grad, *_):
    x, w_in, b_in, w_out, *saved = ctx.saved_tensors
    dx, dw_in, db, dw_out = _backward(grad, x, w_in, b_in, w_out, *saved, ctx.activation)
    return dx, dw_in, None if b_in is None else db, dw_out, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def weight_gradient(
    shape: Shape,
    rows: Tensor,
    z: Tensor,
    leaf: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    activation: str | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Float[Tensor, "K n W"], Float[Tensor, "K n"]]:
    """Sum, for each node, of its tokens' z (its activation, where one is named) times their rows (T, W).

    With `bias_dtype` also the sums of z; else the second tensor is empty.
    """
    width, nodes, bias = rows.shape[1], 2**shape.levels - 1, bias_dtype is not None
    block = min(max(power_of_two(width), 16), 128 if shape.columns <= 64 else 64)
    blocks, tile = -(-width // block), 64 if rows.dtype != torch.float32 and shape.columns <= 128 else 32
    # Few groups: their tokens are shared out, and the parts are added. Many: each is one program's.
    splits = max(1, min(_PROGRAMS // (shape.groups * blocks), shape.tokens // 512))
    wide = partial(torch.empty, dtype=torch.float32, device=rows.device)
    out = rows.new_empty(shape.trees, nodes, width, dtype=dtype)
    out_bias = rows.new_empty((shape.trees, nodes) if bias else 0, dtype=bias_dtype or torch.float32)
    above = wide(splits, shape.groups, shape.top, width)
    # The parts of the subtrees' nodes, then those of the groups' ancestors.
    parts_bias = wide(splits * (nodes + shape.groups * shape.top) if bias else 0)
    for tree in range(shape.trees):
        target = out[tree] if splits == 1 else wide(splits, nodes, width)
        launch(
            weight_gradient_kernel, (shape.groups, blocks, splits),
            rows, z[tree], leaf[tree], groups.order[tree], groups.starts[tree],
            target, above, parts_bias,
            W=width, TOP=shape.top, LOW=shape.low, TILE=tile, COLUMNS=shape.columns, BLOCK=block, SPLITS=splits,
            KIND=-1 if activation is None else kind_of(activation), BIAS=bias, PRECISION="ieee",
            warps=8 if shape.columns * block > 4096 else 4,
        )  # fmt: skip
        if splits > 1:
            out[tree] = target.sum(0)
        launch(
            fold_kernel, (shape.groups - 1, blocks), above, out[tree],
            W=width, TOP=shape.top, SPLITS=splits, BLOCK=block,
        )  # fmt: skip
        if bias:
            out_bias[tree] = parts_bias[: splits * nodes].view(splits, nodes).sum(0)
            launch(
                fold_kernel, (shape.groups - 1, 1), parts_bias[splits * nodes :], out_bias[tree],
                W=1, TOP=shape.top, SPLITS=splits, BLOCK=16,
            )  # fmt: skip
    return out, out_bias


_PROGRAMS = 256  # about two for each processor of an H100


@jit
def group_backward_kernel(
    grad_ptr, w_in_ptr, w_out_ptr, order_ptr, starts_ptr, leaf_ptr, z_ptr, dz_ptr, dx_ptr,
    E: tl.constexpr, O: tl.constexpr, TOP: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,) of one tree: dz[token] (levels) and dx[token] (E), added to what is there if ADD."""
    LEVELS: tl.constexpr = TOP + LOW
    group, start, end = tile_of_group(starts_ptr, tl.program_id(0), 2**TOP, TILE)
    if group == 2**TOP:
        return
    place = start + tl.arange(0, TILE)
    inside = place < end
    token = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int64)
    node, level, local, below, valid = columns_of_group(group, TOP, LOW, COLUMNS)
    node = node.to(tl.int64)

    da = tl.zeros([TILE, COLUMNS], tl.float32)
    o = tl.arange(0, BLOCK_O)
    for first in range(0, O, BLOCK_O):
        column = first + o
        grad = tl.load(
            grad_ptr + token[:, None] * O + column[None, :],
            mask=inside[:, None] & (column < O)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_out_ptr + node[None, :] * O + column[:, None],
            mask=valid[None, :] & (column < O)[:, None],
            other=0.0,
        )
        da = tl.dot(grad, w, da, input_precision=PRECISION)

    leaf = tl.load(leaf_ptr + token, mask=inside, other=0)
    on = on_path(leaf[:, None], local[None, :], below[None, :], valid[None, :], LOW) & inside[:, None]
    at = token[:, None] * LEVELS + level[None, :]
    z = tl.load(z_ptr + at, mask=on, other=0.0)
    dz = tl.where(on, da * slope(z, KIND), 0.0)
    tl.store(dz_ptr + at, dz, mask=on)

    factor = dz.to(w_in_ptr.dtype.element_ty)
    e = tl.arange(0, BLOCK_E)
    for first in range(0, E, BLOCK_E):
        column = first + e
        w = tl.load(
            w_in_ptr + node[:, None] * E + column[None, :],
            mask=valid[:, None] & (column < E)[None, :],
            other=0.0,
        )
        dx = tl.dot(factor, w, input_precision=PRECISION)
        target = dx_ptr + token[:, None] * E + column[None, :]
        mask = inside[:, None] & (column < E)[None, :]
        if ADD:
            dx += tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, dx, mask=mask)


@jit
def weight_gradient_kernel(
    rows_ptr, z_ptr, leaf_ptr, order_ptr, starts_ptr, out_ptr, above_ptr, bias_ptr,
    W: tl.constexpr, TOP: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (groups, blocks of W, splits): out[split, node] (W) of the subtree, above[split, group, level] (W).

    With BIAS the sums of z as well, laid out in `bias` like out and then above with W = 1.
    """
    LEVELS: tl.constexpr = TOP + LOW
    group = tl.program_id(0)
    split = tl.program_id(2)
    node, level, local, below, valid = columns_of_group(group, TOP, LOW, COLUMNS)
    start = tl.load(starts_ptr + group)
    end = tl.load(starts_ptr + group + 1)
    share = tl.cdiv(tl.cdiv(end - start, TILE), SPLITS) * TILE
    start += split * share
    end = tl.minimum(start + share, end)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([COLUMNS, BLOCK], tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    for first in range(start, end, TILE):
        place = first + tl.arange(0, TILE)
        inside = place < end
        token = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int64)
        leaf = tl.load(leaf_ptr + token, mask=inside, other=0)
        on = on_path(leaf[None, :], local[:, None], below[:, None], valid[:, None], LOW) & inside[None, :]
        z = tl.load(z_ptr + token[None, :] * LEVELS + level[:, None], mask=on, other=0.0)
        if BIAS:
            sums += tl.sum(z, 1)
        if KIND >= 0:
            z = activate(z, KIND)
        row = tl.load(
            rows_ptr + token[:, None] * W + column[None, :],
            mask=inside[:, None] & (column < W)[None, :],
            other=0.0,
        )
        total = tl.dot(z.to(row.dtype), row, total, input_precision=PRECISION)
    known = (column < W)[None, :]
    subtree = valid & (below >= 0)
    out_row = split.to(tl.int64) * (2**LEVELS - 1) + node
    tl.store(out_ptr + out_row[:, None] * W + column[None, :], total, mask=subtree[:, None] & known)
    above_row = (split.to(tl.int64) * 2**TOP + group) * TOP + level
    tl.store(
        above_ptr + above_row[:, None] * W + column[None, :],
        total,
        mask=(valid & (below < 0))[:, None] & known,
    )
    if BIAS:  # one store: a loop's reduction with two uses fails in Triton 3.6
        above_row += SPLITS * (2**LEVELS - 1)
        tl.store(bias_ptr + tl.where(subtree, out_row, above_row), sums, mask=valid & (tl.program_id(1) == 0))


@jit
def fold_kernel(
    above_ptr, out_ptr, W: tl.constexpr, TOP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (nodes of the top levels, blocks of W): out[node] (W), the sum over the groups below it."""
    GROUPS: tl.constexpr = 2**TOP
    node = tl.program_id(0)
    heap = node + 1
    level = 0
    for up in tl.static_range(1, TOP):
        level += (heap >= 2**up).to(tl.int32)
    first = (heap << (TOP - level)) - GROUPS
    count = GROUPS >> level
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([8, BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        for start in range(0, count, 8):
            member = start + tl.arange(0, 8)
            row = ((split * GROUPS + first + member) * TOP + level).to(tl.int64)
            total += tl.load(
                above_ptr + row[:, None] * W + column[None, :],
                mask=(member < count)[:, None] & (column < W)[None, :],
                other=0.0,
            )
    tl.store(out_ptr + node.to(tl.int64) * W + column, tl.sum(total, 0), mask=column < W)

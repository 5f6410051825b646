"""GPTQ (arXiv 2210.17323, section 3) on our grids: weights rounded so that a layer's outputs stay, not each weight.

A row of W is rounded column by column; each column's error is spread over the columns still to come by the inverse of the
inputs' second moments, H = X X^T. Plain PyTorch, on a CPU or a GPU.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.quantization.formats import check_quantize
from shoestring.quantization.grids import (
    GROUP,
    Grid,
    check_matrix,
    grid_of_blocks,
    levels_on,
    round_to_nearest,
)

__all__ = ["calibrated", "gptq", "rounded"]

_COLUMNS = 128
"""Columns whose errors reach the later ones together (section 3.3, step 2)."""


def gptq(
    weight: Float[Tensor, "N K"],
    hessian: Float[Tensor, "K K"],
    quantize: str,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
    clip: bool = True,
) -> Grid:
    """Round a weight to its grid, for the least change of its outputs on inputs of second moments `hessian`.

    A group's grid is found when its first column is reached, on the weights as the earlier errors have moved them; in
    activation order, where a group's columns are not reached together, on the weights as they were.

    Args:
        hessian: the mean of x x^T over a layer's inputs x; its size does not matter.
        damping: what is added to its diagonal, as a share of the diagonal's mean (section 3.3, step 3).
        activation_order: go from the inputs of largest second moment to the smallest, instead of in their own order.
        clip: in int4, search each group's grid as `pack` does; else it spans the group.

    Raises:
        RequestError: an unknown `quantize`, a width that is no multiple of 32, or a Hessian that does not fit or is none.
    """
    check_matrix(weight, quantize)
    outputs, inputs = weight.shape
    order = hessian.diagonal().argsort(descending=True, stable=True) if activation_order else None
    factor = _factor(hessian, inputs, damping, order).to(weight.device)
    left = weight.detach().float().clone()  # [N, K], in the order of rounding
    scales = torch.empty(outputs, inputs // GROUP, device=weight.device)
    minima = torch.zeros_like(scales) if quantize == "int4" else None
    if order is not None:
        found, lowest = grid_of_blocks(left.unflatten(1, (-1, GROUP)), quantize, clip=clip)
        scales.copy_(found)
        if minima is not None and lowest is not None:
            minima.copy_(lowest)
        left = left[:, order]
    places = list(range(inputs)) if order is None else order.tolist()
    levels = torch.empty_like(left)
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        part, errors = left[:, start:end], torch.empty(outputs, end - start, device=weight.device)
        for at in range(start, end):
            group, here = places[at] // GROUP, at - start
            if order is None and at % GROUP == 0:
                block = part[:, None, here : here + GROUP]
                found, lowest = grid_of_blocks(block, quantize, clip=clip)
                scales[:, group] = found[:, 0]
                if minima is not None and lowest is not None:
                    minima[:, group] = lowest[:, 0]
            scale = scales[:, group]
            minimum = None if minima is None else minima[:, group]
            level = levels_on(part[:, here], scale, minimum)
            value = level * scale if minimum is None else level * scale + minimum
            levels[:, places[at]] = level
            error = (part[:, here] - value) / factor[at, at]
            part[:, here + 1 :].addr_(error, factor[at, at + 1 : end], alpha=-1)
            errors[:, here] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    integers = levels.to(torch.int8 if minima is None else torch.uint8)
    return Grid(quantize, integers, scales.half(), None if minima is None else minima.half())


def _factor(hessian: Tensor, inputs: int, damping: float, order: Tensor | None) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, U^T U, in float32."""
    if hessian.shape != (inputs, inputs):
        raise RequestError(
            f"a Hessian of shape {list(hessian.shape)} does not fit a weight of {inputs} inputs"
        )
    if not damping > 0:
        raise RequestError(f"damping {damping} leaves the Hessian singular: it must be above 0")
    precise = hessian.detach()
    precise = precise.cpu().double() if precise.device.type == "mps" else precise.double()
    mean = precise.diagonal().mean()
    if not (precise.isfinite().all() and mean >= 0):
        raise RequestError(
            "the Hessian is no matrix of second moments: it holds infinities or negative squares"
        )
    if order is not None:
        precise = precise[order.to(precise.device)][:, order.to(precise.device)]
    shift = (
        damping * mean if mean > 0 else torch.ones_like(mean)
    )  # no input was ever there: round each by itself
    damped = precise + shift * torch.eye(inputs, dtype=precise.dtype, device=precise.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise RequestError(f"the Hessian is not positive definite with damping {damping}")
    return upper.float()


def rounded(model: nn.Module, quantize: str, *, clip: bool = True) -> dict[str, Grid]:
    """Put the nearest values of the grids in place of a causal LM's matrices, each by itself (no data).

    The embedding and the head are int8, as `weight_type_for` has them; widths that are no multiple of 32 are rounded to
    bfloat16. Values are exact in a float32 model; in bfloat16 they are rounded again.

    Args:
        clip: as in `round_to_nearest`.

    Returns: the grids by the weights' names.

    Raises:
        RequestError: an unknown `quantize`.
        UnsupportedModelError: not a model of the Llama family.
    """
    _check(quantize)
    layers, prefix = _layers(model)
    grids = _round_ends(model)
    for index, layer in enumerate(layers):
        for name, linear in _linears(layer):
            where = f"{prefix}.{index}.{name}.weight"
            if linear.in_features % GROUP:
                _round_to_bfloat16(linear.weight)
            else:
                grids[where] = round_to_nearest(linear.weight, quantize, clip=clip)
                _put(linear.weight, grids[where])
    return grids


@torch.no_grad()
def calibrated(
    model: nn.Module,
    tokens: Int[Tensor, "B T"],
    quantize: str,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
    clip: bool = True,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Grid]:
    """`rounded` by GPTQ: each matrix on the inputs that `tokens` give it through everything quantised before it.

    Layer by layer, and within a layer in the order in which the matrices run, those of one input together. The embedding
    and the head are rounded to the nearest, to int8. The model is left in evaluation mode.

    Args:
        tokens: sequences of calibration text; 128 of 512 tokens will do for a small model.
        batch: sequences that go through a layer at a time.
        damping, activation_order, clip: as in `gptq`.
        progress: called with the layers that are done, and all.

    Returns: the grids by the weights' names, for `pack_grid`.

    Raises:
        RequestError: an unknown `quantize`, or no tokens.
        UnsupportedModelError: not a model of the Llama family.
    """
    _check(quantize)
    if tokens.dim() != 2 or not tokens.numel():
        raise RequestError(
            f"calibration tokens of shape {list(tokens.shape)}: [sequences, tokens], not empty"
        )
    layers, prefix = _layers(model)
    model.eval()  # dropout would blur the inputs
    grids = _round_ends(model)
    calls = _inputs_of(model, layers[0], tokens, batch)
    for index, layer in enumerate(layers):
        if progress is not None:
            progress(index, len(layers))
        stages, unused = _stages(layer, calls[0])
        if unused:
            raise UnsupportedModelError(f"{prefix}.{index}.{unused[0]} took no inputs")
        for stage in stages:
            moments = _moments(layer, stage[0][1], calls)
            for name, linear in stage:
                where = f"{prefix}.{index}.{name}.weight"
                if linear.in_features % GROUP:
                    _round_to_bfloat16(linear.weight)
                    continue
                grids[where] = gptq(
                    linear.weight,
                    moments,
                    quantize,
                    damping=damping,
                    activation_order=activation_order,
                    clip=clip,
                )
                _put(linear.weight, grids[where])
        calls = [(_output(layer, hidden, others), others) for hidden, others in calls]
    return grids


Call = tuple[Tensor, dict[str, Any]]


def _check(quantize: str) -> None:
    if check_quantize(quantize) is None:
        raise RequestError("quantize None leaves nothing to do: int8 or int4")


def _layers(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The decoder's layers and their name; every matrix in them must be a linear layer's."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(f"{type(model).__name__} has no model.layers: not of the Llama family")
    for index, layer in enumerate(layers):
        known = {f"{name}.weight" for name, _ in _linears(layer)}
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 1 and name not in known:
                raise UnsupportedModelError(
                    f"model.layers.{index}.{name} is no linear layer's weight: GPTQ has no inputs for it"
                )
    return layers, "model.layers"


def _linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)]


def _round_ends(model: Any) -> dict[str, Grid]:
    """The embedding and the head, to int8; one matrix where they are tied."""
    grids: dict[str, Grid] = {}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    ends = {"model.embed_tokens.weight": embedding}
    if head is not embedding:
        ends["lm_head.weight"] = head
    for name, weight in ends.items():
        if weight.shape[1] % GROUP:
            _round_to_bfloat16(weight)
        else:
            grids[name] = round_to_nearest(weight, "int8")
            _put(weight, grids[name])
    return grids


def _put(weight: Tensor, grid: Grid) -> None:
    weight.data.copy_(grid.dense())


def _round_to_bfloat16(weight: Tensor) -> None:
    weight.data.copy_(weight.data.to(torch.bfloat16))


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""


def _inputs_of(model: Any, layer: nn.Module, tokens: Tensor, batch: int) -> list[Call]:
    """What the first layer is called with, for each batch of sequences."""
    calls: list[Call] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], others: dict[str, Any]) -> None:
        others = dict(others)
        hidden = arguments[0] if arguments else others.pop("hidden_states")
        calls.append((hidden, others))
        raise _ReachedError

    device = model.get_input_embeddings().weight.device
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for part in tokens.split(batch):
            with suppress(_ReachedError):
                model(input_ids=part.to(device), use_cache=False)
    finally:
        handle.remove()
    return calls


def _output(layer: nn.Module, hidden: Tensor, others: dict[str, Any]) -> Tensor:
    found: Any = layer(hidden, **others)
    return found[0] if isinstance(found, tuple) else found


def _stages(layer: nn.Module, call: Call) -> tuple[list[list[tuple[str, nn.Linear]]], list[str]]:
    """Linear layers in the order they run, those of one and the same input together; and the names that did not run."""
    ran: list[tuple[Tensor, list[tuple[str, nn.Linear]]]] = []

    def hook_of(name: str, linear: nn.Linear) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if ran and ran[-1][0] is arguments[0]:
                ran[-1][1].append((name, linear))
            else:
                ran.append((arguments[0], [(name, linear)]))

        return hook

    linears = _linears(layer)
    handles = [linear.register_forward_pre_hook(hook_of(name, linear)) for name, linear in linears]
    try:
        _output(layer, *call)
    finally:
        _remove(handles)
    seen = {name for _, stage in ran for name, _ in stage}
    return [stage for _, stage in ran], [name for name, _ in linears if name not in seen]


def _moments(layer: nn.Module, linear: nn.Linear, calls: list[Call]) -> Float[Tensor, "K K"]:
    """The mean of x x^T over a linear layer's inputs, in float32."""
    width = linear.in_features
    total = torch.zeros(width, width, device=linear.weight.device)
    count = 0

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        rows = arguments[0].reshape(-1, width).float()
        total.addmm_(rows.T, rows)
        count += len(rows)
        raise _ReachedError

    handle = linear.register_forward_pre_hook(hook)
    try:
        for hidden, others in calls:
            with suppress(_ReachedError):
                _output(layer, hidden, others)
    finally:
        handle.remove()
    return total / count


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()

"""How the tokens of a text spread over a model's trees, layer by layer."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.statistics import Load, load_of

__all__ = ["NodeCounter", "routing_statistics"]


class NodeCounter:
    """Counts the visits of every node of one layer in the `with` block's forward passes, as `load`."""

    def __init__(self, layer: FastFeedForward) -> None:
        self._layer = layer
        weight = layer.w_in
        self.load = Load(torch.zeros(weight.shape[:2], dtype=torch.long, device=weight.device))

    def __enter__(self) -> "NodeCounter":
        self._hook = self._layer.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0].detach().to(self._layer.w_in.dtype)
        self.load = self.load + load_of(self._layer.paths(x), self._layer.w_in.shape[1])


def routing_statistics(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """One row for each fast feedforward layer of the model, over these batches.

    `dead_nodes` and `dead_leaves`: shares that no token visited; `dead_subtrees`: how many, counted by their roots;
    `busiest_leaf`: the largest share of tokens in one leaf of a tree; `evenness`: of each level's load, 1 where it is even,
    from the root down; `tokens`: how many were counted. With few tokens a leaf is unvisited by chance: 2**depth leaves
    need several times as many.
    """
    layers = [module for module in model.modules() if isinstance(module, FastFeedForward)]
    counters = [NodeCounter(layer) for layer in layers]
    with ExitStack() as stack, torch.no_grad():
        for counter in counters:
            stack.enter_context(counter)
        if counters:
            for batch in batches:
                model.forward(**batch)
    return [_summary(counter.load) for counter in counters]


def _summary(load: Load) -> dict[str, Any]:
    return {
        "dead_nodes": float((load.visits == 0).float().mean()),
        "dead_leaves": load.dead[-1],
        "dead_subtrees": len(load.dead_subtrees),
        "busiest_leaf": float(load.levels[-1].max()) / max(1, load.tokens),
        "evenness": load.evenness,
        "tokens": load.tokens,
    }

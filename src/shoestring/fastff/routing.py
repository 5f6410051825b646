"""How the tokens of a text spread over a model's trees: dead subtrees and load, layer by layer."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.fastff.layer import FastFeedForward

__all__ = ["NodeCounter", "routing_statistics"]


class NodeCounter:
    """Counts visits of every node of one layer while it is in the `with` block."""

    def __init__(self, layer: FastFeedForward) -> None:
        self._layer = layer
        self.visits = torch.zeros(layer.w_in.shape[:2], dtype=torch.long, device=layer.w_in.device)  # [K, n]

    def __enter__(self) -> "NodeCounter":
        self._hook = self._layer.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0].detach().to(self._layer.w_in.dtype)
        nodes = self._layer.paths(x).flatten(0, -3)  # [T, K, D+1]
        for tree, visited in enumerate(nodes.unbind(1)):
            self.visits[tree] += torch.bincount(visited.flatten(), minlength=self.visits.shape[1])

    def summary(self) -> dict[str, float]:
        """Of the layer: see `routing_statistics`."""
        depth = self._layer.depth
        leaves = self.visits[:, 2**depth - 1 :].double()  # [K, 2**D]
        tokens = float(self.visits[:, :1].sum())
        load = leaves / leaves.sum(1, keepdim=True).clamp(min=1)
        entropy = -(load * load.clamp(min=1e-300).log()).sum(1)
        even = max(1e-12, depth * math.log(2)) if depth else 1.0
        return {
            "dead_nodes": float((self.visits == 0).double().mean()),
            "dead_leaves": float((leaves == 0).double().mean()),
            "busiest_leaf": float(load.max()),
            "leaf_entropy": float(entropy.mean() / even) if depth else 1.0,
            "tokens": tokens / self.visits.shape[0],
        }


def routing_statistics(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[dict[str, float]]:
    """One row for each fast feedforward layer of the model, over these batches.

    `dead_nodes` and `dead_leaves`: shares that no token visited; `busiest_leaf`: the largest share of tokens in one
    leaf of a tree; `leaf_entropy`: of the leaves' load, 1 where it is even; `tokens`: how many were counted. With few
    tokens a leaf is unvisited by chance: 2**depth leaves need several times as many.
    """
    layers = [module for module in model.modules() if isinstance(module, FastFeedForward)]
    counters = [NodeCounter(layer) for layer in layers]
    with ExitStack() as stack, torch.no_grad():
        for counter in counters:
            stack.enter_context(counter)
        if counters:
            for batch in batches:
                model.forward(**batch)
    return [counter.summary() for counter in counters]

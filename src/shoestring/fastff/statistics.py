"""How tokens spread over the trees: load of each node and level, dead subtrees.

A subtree that no token visits is never trained again (its neurons get no gradient), so a run watches these numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoestring.errors import RequestError
from shoestring.fastff.functional import depth_of

__all__ = ["Load", "load_of"]


@dataclass(frozen=True)
class Load:
    """Visits of each node, [K, n] of int64. Loads add up: `a + b` is that of both batches."""

    visits: Tensor

    def __add__(self, other: "Load") -> "Load":
        return Load(self.visits + other.visits)

    @property
    def tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.visits[0, 0])

    @property
    def levels(self) -> list[Tensor]:
        """Visits by level, from the root: [K, 2**level] each."""
        return [
            self.visits[:, 2**level - 1 : 2 ** (level + 1) - 1]
            for level in range(depth_of(self.visits.shape[1]) + 1)
        ]

    @property
    def dead(self) -> list[float]:
        """The share of each level's nodes that no token visited."""
        return [float((level == 0).float().mean()) for level in self.levels]

    @property
    def dead_subtrees(self) -> list[tuple[int, int]]:
        """(tree, node) of the roots of dead subtrees: unvisited nodes whose parent was visited."""
        empty = self.visits == 0
        parents = (torch.arange(self.visits.shape[1], device=self.visits.device) - 1).clamp(min=0) // 2
        roots = empty & ~empty[:, parents]
        roots[:, 0] = empty[:, 0]
        return [(tree, node) for tree, node in roots.nonzero().tolist()]

    @property
    def evenness(self) -> list[float]:
        """The entropy of each level's load over that of an even one: 1 is even, 0 is all tokens in one node."""
        shares = []
        for index, level in enumerate(self.levels):
            load = level.double() / level.sum(-1, keepdim=True).clamp(min=1)
            entropy = torch.special.entr(load).sum(-1).mean()
            shares.append(float(entropy / torch.tensor(2.0).log() / index) if index else 1.0)
        return shares


def load_of(nodes: Tensor, neurons: int) -> Load:
    """The load of paths [..., K, D+1] (see `FastFeedForward.paths`) in trees of `neurons` nodes each.

    Raises:
        RequestError: the paths are not as long as such trees are deep.
    """
    levels = depth_of(neurons) + 1
    if nodes.dim() < 2 or nodes.shape[-1] != levels:
        raise RequestError(
            f"paths of shape {list(nodes.shape)} do not fit trees of {neurons} nodes in {levels} levels"
        )
    trees = nodes.shape[-2]
    flat = (
        nodes.reshape(-1, trees, nodes.shape[-1])
        + neurons * torch.arange(trees, device=nodes.device)[:, None]
    )
    return Load(torch.bincount(flat.flatten(), minlength=trees * neurons).view(trees, neurons))

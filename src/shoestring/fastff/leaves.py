"""Fast feedforward in its original form (arXiv 2308.14711): a tree of hyperplanes over small feedforward leaves.

Training mixes all leaves, softly: a node sends the share c = sigmoid(w . x + b) of a token right. Evaluation walks:
right where c > 1/2, and one leaf is computed. Adding `h` times the entropy of the nodes' decisions to the loss makes
them hard in time, so that both agree (section 2, "hardening").

Shapes: T tokens, E hidden size, W leaf width, O output size, L = 2**depth leaves.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.errors import RequestError
from shoestring.fastff.functional import activation_function

__all__ = ["FFF", "hardening_loss"]

# Tokens up to which each gathers its own leaf; more go leaf by leaf.
_FEW_TOKENS = 16


class FFF(nn.Module):
    """2**depth small feedforwards of which evaluation uses one a token: soft in training, hard in evaluation.

    Args:
        hidden_size: E.
        leaf_size: W, the hidden neurons of each leaf.
        depth: levels of nodes; 0 is one plain feedforward.
        output_size: O; None: as the input.
        activation: of the leaves.
        region_leak: in training, the probability with which a node's decision is turned round: neighbours of a
            region then see some of its tokens (section 2, "overfragmentation").

    Attributes:
        node_weight: [L-1, E]; node_bias: [L-1]; children of node i are 2 i + 1 and 2 i + 2.
        leaf_in: [L, E, W]; leaf_in_bias: [L, W]; leaf_out: [L, W, O]; leaf_out_bias: [L, O].
        entropy: of the decisions in the last forward pass, in nats, averaged over nodes and tokens; with gradient in
            training.

    Raises:
        RequestError: a size that no layer has, an unknown activation.

    Example:
        >>> layer = FFF(64, leaf_size=8, depth=3)
        >>> loss = layer(torch.randn(4, 64)).square().mean() + hardening_loss(layer, 3.0)
    """

    def __init__(
        self,
        hidden_size: int,
        leaf_size: int,
        depth: int,
        *,
        output_size: int | None = None,
        activation: str = "gelu",
        region_leak: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        outputs = hidden_size if output_size is None else output_size
        for name, value, least in (
            ("hidden_size", hidden_size, 1), ("leaf_size", leaf_size, 1), ("depth", depth, 0), ("output_size", outputs, 1),
        ):  # fmt: skip
            if value < least:
                raise RequestError(f"{name}={value}: a tree of leaves needs at least {least}")
        if not 0 <= region_leak < 1:
            raise RequestError(f"region_leak={region_leak} is no probability below 1")
        activation_function(activation)
        self.hidden_size, self.leaf_size, self.output_size = hidden_size, leaf_size, outputs
        self.depth, self.activation, self.region_leak = depth, activation, region_leak
        leaves = 2**depth

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.node_weight, self.node_bias = parameter(leaves - 1, hidden_size), parameter(leaves - 1)
        self.leaf_in, self.leaf_in_bias = (
            parameter(leaves, hidden_size, leaf_size),
            parameter(leaves, leaf_size),
        )
        self.leaf_out, self.leaf_out_bias = parameter(leaves, leaf_size, outputs), parameter(leaves, outputs)
        self.entropy: Tensor = self.node_weight.new_zeros(()).detach()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As linear layers: uniform within 1/sqrt(inputs)."""
        for tensor in (self.node_weight, self.node_bias, self.leaf_in, self.leaf_in_bias):
            if tensor.numel():
                nn.init.uniform_(tensor, -1 / math.sqrt(self.hidden_size), 1 / math.sqrt(self.hidden_size))
        for tensor in (self.leaf_out, self.leaf_out_bias):
            nn.init.uniform_(tensor, -1 / math.sqrt(self.leaf_size), 1 / math.sqrt(self.leaf_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., O]: the soft mixture in training, one leaf in evaluation.

        Raises:
            RequestError: x has another width or dtype than the layer.
        """
        rows = self._rows(x)
        y = self._soft(rows) if self.training else self._hard(rows)
        return y.view(*x.shape[:-1], self.output_size)

    def leaves(self, x: Tensor) -> Tensor:
        """The leaf of each token in evaluation: [..., E] -> [...] of int64."""
        with torch.no_grad():
            return self._leaf_of(self._rows(x)).view(x.shape[:-1])

    def _rows(self, x: Tensor) -> Tensor:
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            raise RequestError(
                f"the input's shape {list(x.shape)} does not end in the layer's hidden_size={self.hidden_size}"
            )
        if x.dtype != self.leaf_in.dtype and not torch.is_autocast_enabled(x.device.type):
            raise RequestError(
                f"the input is {x.dtype}, the layer {self.leaf_in.dtype}: convert one of them, or use torch.autocast"
            )
        return x.reshape(-1, self.hidden_size)

    def _soft(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.node_weight, self.node_bias)  # [T, L-1]
        right = torch.sigmoid(scores)
        # The entropy of a decision, stable for certain ones: -(c log c + (1 - c) log(1 - c)), c = sigmoid(s).
        uncertainty = F.softplus(scores) - scores * right
        self.entropy = uncertainty.mean() if uncertainty.numel() else uncertainty.sum()
        if self.region_leak > 0:
            turned = torch.rand_like(right) < self.region_leak
            right = torch.where(turned, 1 - right, right)
        share = x.new_ones(x.shape[0], 1)
        for level in range(self.depth):
            turn = right[:, 2**level - 1 : 2 ** (level + 1) - 1]
            share = torch.stack([share * (1 - turn), share * turn], -1).flatten(-2)  # [T, 2**(level+1)]
        hidden = torch.einsum("te,lew->tlw", x, self.leaf_in) + self.leaf_in_bias
        hidden = activation_function(self.activation)(hidden) * share[..., None]
        return hidden.flatten(1) @ self.leaf_out.flatten(0, 1) + share @ self.leaf_out_bias

    def _leaf_of(self, x: Tensor) -> Tensor:
        node = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        for _ in range(self.depth):
            score = (x * self.node_weight[node]).sum(-1) + self.node_bias[node]
            node = 2 * node + 1 + (score > 0)
        return node - (2**self.depth - 1)

    def _hard(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            leaf = self._leaf_of(x)
        self.entropy = x.new_zeros(())
        function = activation_function(self.activation)
        if x.shape[0] <= _FEW_TOKENS:
            hidden = function(torch.einsum("te,tew->tw", x, self.leaf_in[leaf]) + self.leaf_in_bias[leaf])
            return torch.einsum("tw,two->to", hidden, self.leaf_out[leaf]) + self.leaf_out_bias[leaf]
        order = leaf.argsort()
        counts = torch.bincount(leaf, minlength=2**self.depth).tolist()
        parts = []
        for index, rows in enumerate(x[order].split(counts)):
            if len(rows):
                hidden = function(torch.addmm(self.leaf_in_bias[index], rows, self.leaf_in[index]))
                parts.append(torch.addmm(self.leaf_out_bias[index], hidden, self.leaf_out[index]))
        y = torch.cat(parts)
        return y[order.argsort()]

    def __getstate__(self) -> dict[str, Any]:
        """Without the last pass's graph, which cannot be copied."""
        return {**self.__dict__, "entropy": self.entropy.detach()}

    def extra_repr(self) -> str:
        """Sizes, as PyTorch prints them."""
        return (
            f"hidden_size={self.hidden_size}, leaf_size={self.leaf_size}, depth={self.depth}, "
            f"output_size={self.output_size}, activation={self.activation!r}, region_leak={self.region_leak}"
        )


def hardening_loss(model: nn.Module, strength: float) -> Tensor:
    """`strength` (h of the paper) times the mean entropy of each `FFF` in the model's last forward pass, summed.

    Raises:
        RequestError: there is no `FFF` in the model.
    """
    layers = [module for module in model.modules() if isinstance(module, FFF)]
    if not layers:
        raise RequestError("hardening_loss: the model has no FFF layer")
    return strength * torch.stack([layer.entropy for layer in layers]).sum()

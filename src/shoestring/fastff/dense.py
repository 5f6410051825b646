"""The plain feedforward that trees are held against: at the full width, and at the width that a token's path has."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DenseFeedForward"]


class DenseFeedForward(nn.Module):
    """Every neuron for every token: [..., E] -> [..., E]; a bias, if any, in the neurons only, as a tree has it."""

    def __init__(self, hidden_size: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, width, bias=bias)
        self.outer = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return self.outer(F.gelu(self.inner(x)))

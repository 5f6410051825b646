"""The fast feedforward layer of UltraFastBERT (arXiv 2311.10770): K binary trees of neurons, one path of each a token."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.errors import RequestError
from shoestring.fastff import functional, native
from shoestring.fastff.methods import check_method, choose, needs_gradient, run

__all__ = ["FastFeedForward"]

_READY = ("auto", "native")


class FastFeedForward(nn.Module):
    """A feedforward layer of K trees of 2**(depth+1) - 1 neurons, of which a token uses K * (depth + 1).

    Each neuron on a path adds `f(z) * w_out[node]`, z = x . w_in[node] + b_in[node], and sends the token right where
    z > 0. `train()` and `eval()` give the same output: routing is hard in both and learns because the hyperplane is
    the neuron.

    Args:
        hidden_size: E, the width of the input.
        depth: D; 0 is a single neuron a tree.
        trees: K, whose outputs are summed.
        output_size: O; None: as the input.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        method: "plain" (level by level), "masked" (dense products and a mask), "sparse" (forward and backward touch
            only the paths), "native" (C++, inference on the CPU), "triton" (kernels for NVIDIA GPUs) or "auto".

    Attributes:
        w_in: [K, n, E], n = 2**(depth+1) - 1; a row for each node, so that a path reads whole rows.
        b_in: [K, n] or None.
        w_out: [K, n, O].

    Raises:
        RequestError: a size that no layer has, an unknown activation or method.

    Example:
        >>> layer = FastFeedForward(64, depth=3)
        >>> layer(torch.randn(2, 5, 64)).shape, layer.active_neurons, layer.neurons
        (torch.Size([2, 5, 64]), 4, 15)
    """

    def __init__(
        self,
        hidden_size: int,
        depth: int,
        *,
        trees: int = 1,
        output_size: int | None = None,
        bias: bool = True,
        activation: str = "gelu",
        method: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        outputs = hidden_size if output_size is None else output_size
        for name, value, least in (
            ("hidden_size", hidden_size, 1), ("depth", depth, 0), ("trees", trees, 1), ("output_size", outputs, 1),
        ):  # fmt: skip
            if value < least:
                raise RequestError(f"{name}={value}: a fast feedforward layer needs at least {least}")
        if depth > 24:
            raise RequestError(f"depth={depth}: trees of more than 2**25 neurons are not supported")
        functional.activation_function(activation)
        check_method(method)
        self.hidden_size, self.output_size = hidden_size, outputs
        self.depth, self.trees = depth, trees
        self.activation, self.method = activation, method
        self._ready: Any = None
        nodes = 2 ** (depth + 1) - 1
        self.w_in = nn.Parameter(torch.empty(trees, nodes, hidden_size, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(trees, nodes, outputs, device=device, dtype=dtype))
        if bias:
            self.b_in = nn.Parameter(torch.empty(trees, nodes, device=device, dtype=dtype))
        else:
            self.register_parameter("b_in", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(E) (in, bias) and 1/sqrt((D+1) K) (out), as in UltraFastBERT."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.w_in, -bound, bound)
        if self.b_in is not None:
            nn.init.uniform_(self.b_in, -bound, bound)
        bound = 1 / math.sqrt(self.active_neurons)
        nn.init.uniform_(self.w_out, -bound, bound)

    @property
    def neurons(self) -> int:
        """Neurons in all trees."""
        return self.trees * (2 ** (self.depth + 1) - 1)

    @property
    def active_neurons(self) -> int:
        """Neurons that one token uses."""
        return self.trees * (self.depth + 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., O]. A NaN or an infinity in a token spoils the output of that token only.

        Raises:
            RequestError: x has another width, dtype or device than the layer.
        """
        if self._ready is not None and not torch.compiler.is_compiling():
            y = self._run_ready(x)
            if y is not None:
                return y
        self.check(x)
        rows = x.reshape(-1, self.hidden_size)
        method = choose(rows, self.w_in, self.b_in, self.w_out, self.method)
        y = run(method, rows, self.w_in, self.b_in, self.w_out, self.activation)
        if method == "native":
            self._make_ready()
        return y.view(*x.shape[:-1], self.output_size)

    def _make_ready(self) -> None:
        """Keep the kernel over the weights' memory as it is: a call then costs few microseconds of Python."""
        weights = (self.w_in, self.b_in, self.w_out)
        addresses = tuple(0 if weight is None else weight.data_ptr() for weight in weights)
        self._ready = (native.kernel_of(*weights, self.activation), addresses, self.activation)

    def _run_ready(self, x: Tensor) -> Tensor | None:
        """What `forward` gives by the kept kernel; None where it does not fit. Every line here costs a tenth of a µs."""
        parameters = self._parameters  # attributes of a module are slow
        w_in, b_in, w_out = parameters["w_in"], parameters["b_in"], parameters["w_out"]
        kernel, addresses, activation = self._ready
        if (
            type(x) is not Tensor
            or w_in is None
            or w_out is None
            or x.dtype is not w_in.dtype
            or not x.is_cpu
            or not x.is_contiguous()
            or (w_in.data_ptr(), 0 if b_in is None else b_in.data_ptr(), w_out.data_ptr()) != addresses
            or self.activation is not activation
            or self.method not in _READY
            or (torch.is_grad_enabled() and needs_gradient(x, w_in, b_in, w_out))
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        shape = x.shape
        if not shape or shape[-1] != self.hidden_size:
            return None
        if self.output_size == self.hidden_size:
            y = torch.empty_like(x)
        else:
            y = x.new_empty((*shape[:-1], self.output_size))
        kernel.run(x.data_ptr(), y.data_ptr(), x.numel() // self.hidden_size, torch.get_num_threads())
        return y

    def __getstate__(self) -> dict[str, Any]:
        """All but the kept kernel, which is of this process and this memory."""
        return {**self.__dict__, "_ready": None}

    def paths(self, x: Tensor) -> Tensor:
        """The nodes that each token visits, from the root down: [..., E] -> [..., K, D+1] of int64."""
        self.check(x)
        nodes = functional.paths(x.reshape(-1, self.hidden_size), self.w_in, self.b_in)
        return nodes.view(*x.shape[:-1], self.trees, self.depth + 1)

    def check(self, x: Tensor) -> None:
        """Raises: RequestError: this layer cannot take x."""
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            raise RequestError(
                f"the input's shape {list(x.shape)} does not end in the layer's hidden_size={self.hidden_size}"
            )
        if x.device != self.w_in.device:
            raise RequestError(f"the input is on {x.device}, the layer on {self.w_in.device}")
        if x.dtype != self.w_in.dtype and not torch.is_autocast_enabled(x.device.type):
            raise RequestError(
                f"the input is {x.dtype}, the layer {self.w_in.dtype}: convert one of them, or use torch.autocast"
            )

    def extra_repr(self) -> str:
        """Sizes, as PyTorch prints them."""
        return (
            f"hidden_size={self.hidden_size}, depth={self.depth}, trees={self.trees}, output_size={self.output_size}, "
            f"bias={self.b_in is not None}, activation={self.activation!r}, method={self.method!r}"
        )

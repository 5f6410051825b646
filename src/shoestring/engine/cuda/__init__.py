"""The engine on NVIDIA GPUs: fused Triton kernels over a paged cache, replayed as CUDA graphs.

Nothing here is imported where it is not needed, as Triton comes with PyTorch for CUDA only.
"""

from importlib import util
from typing import Any

import torch

__all__ = ["cuda_runner_of", "why_not_here"]


def why_not_here(device: torch.device) -> str | None:
    """Why the fused step cannot run on this device; None where it can."""
    if device.type != "cuda":
        return f"device {device} is not an NVIDIA GPU"
    if torch.version.cuda is None:
        return "this PyTorch is not built for NVIDIA GPUs"
    if util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"
    return None


def cuda_runner_of(module: torch.nn.Module, *, quantize: str | None = None, **options: Any) -> Any:
    """A `CudaRunner` over a module on a GPU.

    Raises:
        UnsupportedModelError: the device or the architecture has no fused step, or a probe found it wrong.
    """
    from shoestring.engine.cuda.loading import runner_of_module
    from shoestring.errors import UnsupportedModelError

    reason = why_not_here(next(module.parameters()).device)
    if reason is not None:
        raise UnsupportedModelError(reason)
    return runner_of_module(module, quantize=quantize, **options)

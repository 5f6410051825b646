"""The rope scaling of a GGUF, which transformers' loader drops: long texts would go wrong silently."""

import math
from typing import Any

from shoestring.errors import UnsupportedModelError
from shoestring.hub.gguf_header import GgufHeader

__all__ = ["mend_rope"]

_LLAMA3_RANGE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def mend_rope(config: Any, header: GgufHeader) -> None:
    """Write the file's rope scaling into `config`, or refuse the file if it cannot be said there."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") != "default":
        return  # transformers has read it
    if "rope_factors_long.weight" in header.tensors:
        raise UnsupportedModelError(f"{header.path}: its long-context rope factors are not converted")
    if "rope_freqs.weight" in header.tensors:
        rope.update(_llama3(header, float(rope["rope_theta"])))
        return
    prefix = f"{header.architecture}.rope.scaling"
    kind = header.metadata.get(f"{prefix}.type", "none")
    factor = header.metadata.get(
        f"{prefix}.factor", header.metadata.get(f"{header.architecture}.rope.scale_linear")
    )
    if kind == "none" or factor in (None, 0, 1):
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{header.path}: its rope scaling {kind!r} is not converted")
    rope.update(rope_type=kind, factor=float(factor))
    original = header.metadata.get(f"{prefix}.original_context_length")
    if kind == "yarn" and original:
        rope["original_max_position_embeddings"] = int(original)


def _llama3(header: GgufHeader, theta: float) -> dict[str, Any]:
    """The Llama 3 scaling whose per-frequency factors are the file's, checked one by one."""
    import numpy as np

    tensor = header.tensors["rope_freqs.weight"]
    if tensor.ggml_type != 0:
        raise UnsupportedModelError(f"{header.path}: rope_freqs.weight is not of type F32")
    factors = np.fromfile(header.path, dtype="<f4", count=tensor.shape[0], offset=tensor.start)
    factor, length = round(float(factors.max()), 3), 8192.0
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((length / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise UnsupportedModelError(f"{header.path}: its rope frequencies are not those of Llama 3")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_RANGE}

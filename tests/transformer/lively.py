"""Small untrained models with opinions."""

import torch

from shoestring.transformer.config import preset
from shoestring.transformer.model import Transformer


def lively(name: str, **changes) -> Transformer:
    """An untrained model whose texts end at different lengths: weights large enough to have opinions, in float64."""
    torch.manual_seed(3)
    model = Transformer(preset(name, **{"vocab_size": 40, "layers": 2, "d_model": 32, "d_ff": 48, **changes}))
    model = model.double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.6) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    return model

"""The model's shape: presets of the paper and their modern twins, and every number that Table 3 varies."""

from typing import Any

from transformers import PretrainedConfig

from shoestring.errors import RequestError, suggest

__all__ = ["PRESETS", "TransformerConfig", "preset"]

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 4, "d_model": 128, "d_ff": 256, "heads": 4, "dropout": 0.3},
    "iwslt": {"layers": 6, "d_model": 512, "d_ff": 1024, "heads": 4, "dropout": 0.3},
    "base": {"layers": 6, "d_model": 512, "d_ff": 2048, "heads": 8, "dropout": 0.1},
    "big": {"layers": 6, "d_model": 1024, "d_ff": 4096, "heads": 16, "dropout": 0.3},
}
_STYLES: dict[str, dict[str, Any]] = {
    "paper": {"norm": "post", "norm_kind": "layer", "activation": "relu"},
    "modern": {"norm": "pre", "norm_kind": "rms", "activation": "swiglu"},
}
PRESETS = tuple(f"{style}-{shape}" for style in _STYLES for shape in _SHAPES)


class TransformerConfig(PretrainedConfig):
    """Shape and style. `d_k` and `d_v` are per head; None is `d_model / heads`."""

    model_type = "shoestring-transformer"
    is_encoder_decoder = True
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "heads", "num_hidden_layers": "layers"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 37000,
        layers: int = 6,
        d_model: int = 512,
        d_ff: int = 2048,
        heads: int = 8,
        d_k: int | None = None,
        d_v: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        norm: str = "post",
        norm_kind: str = "layer",
        activation: str = "relu",
        positions: str = "sinusoidal",
        max_positions: int = 1024,
        label_smoothing: float = 0.1,
        pad_token_id: int = 0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.layers, self.d_model, self.d_ff, self.heads = (
            vocab_size,
            layers,
            d_model,
            d_ff,
            heads,
        )
        self.d_k = d_k if d_k is not None else d_model // heads
        self.d_v = d_v if d_v is not None else d_model // heads
        self.dropout, self.attention_dropout, self.label_smoothing = (
            dropout,
            attention_dropout,
            label_smoothing,
        )
        self.norm, self.norm_kind, self.activation = norm, norm_kind, activation
        self.positions, self.max_positions = positions, max_positions
        kwargs.setdefault("decoder_start_token_id", bos_token_id)
        kwargs["is_encoder_decoder"] = True
        kwargs["tie_word_embeddings"] = True
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**kwargs)

    def check(self) -> "TransformerConfig":
        """Refuse a shape that cannot be.

        Raises:
            RequestError: with the numbers that do not fit.
        """
        choices = {
            "norm": ("post", "pre"),
            "norm_kind": ("layer", "rms"),
            "activation": ("relu", "swiglu"),
            "positions": ("sinusoidal", "learned"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise RequestError(f"model.{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if min(self.d_k, self.d_v) < 1:
            raise RequestError(f"d_model {self.d_model} is too small for {self.heads} heads; lower heads")
        if self.d_model % 2:
            raise RequestError(f"d_model is {self.d_model}; it must be even (sines and cosines)")
        return self


def preset(name: str, **changes: Any) -> TransformerConfig:
    """The configuration of a preset such as `paper-base` or `modern-tiny`, with changes.

    Raises:
        RequestError: there is no such preset, or the changes cannot be.
    """
    style, _, shape = name.partition("-")
    if style not in _STYLES or shape not in _SHAPES:
        raise RequestError(f"unknown preset {name!r}{suggest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return TransformerConfig(**{**_SHAPES[shape], **_STYLES[style], **changes}).check()

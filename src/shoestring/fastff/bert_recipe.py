"""What the recipe of a masked language model may say."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shoestring.errors import RequestError
from shoestring.fastff.bert_config import UltraFastBertConfig
from shoestring.training.recipe import Recipe, Section

__all__ = ["BertRecipe", "ModelSettings", "TextSettings", "feedforward_of"]

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
_FEEDFORWARD = re.compile(r"(?:fff-(?P<trees>\d+)x(?P<depth>\d+)|dense-(?P<width>\d+))")


def feedforward_of(name: str) -> dict[str, Any]:
    """`fff-1x11` (trees x depth) or `dense-3072` (width) as the configuration's fields.

    Raises:
        RequestError: it is neither.
    """
    found = _FEEDFORWARD.fullmatch(name)
    if not found:
        raise RequestError(
            f"model.feedforward is {name!r}; write fff-1x11 for one tree of depth 11, or dense-3072 for that many neurons"
        )
    kind = "dense" if found["width"] else "fff"
    sizes = {key: int(value) for key, value in found.groupdict().items() if value}
    if any(value == 0 for key, value in sizes.items() if key != "depth") or sizes.get("depth", 0) > 20:
        raise RequestError(
            f"model.feedforward is {name!r}: no layer has such sizes (a tree's depth is at most 20)"
        )
    return {"feedforward": kind, **sizes}


class ModelSettings(Section):
    """The encoder's shape; `feedforward` is the one thing in which the arms of a comparison differ."""

    feedforward: str = "fff-1x11"
    hidden_size: Count = 768
    layers: Count = 16
    heads: Count = 12
    positions: Literal["rotary", "sinusoidal", "learned"] = "sinusoidal"
    max_positions: Count = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    feedforward_bias: bool = True

    def config(self, vocab_size: int, method: str = "auto") -> UltraFastBertConfig:
        """The model's configuration."""
        shape = self.model_dump(exclude={"feedforward"})
        return UltraFastBertConfig(
            vocab_size=vocab_size, feedforward_method=method, **feedforward_of(self.feedforward), **shape
        ).check()


class TextSettings(Section):
    """Where the text is (see `text_source.py`) and how it is cut into pieces and rows.

    `held_out` is the share of documents that no training sees. The tokenizer is learnt from the first
    `tokenizer_characters` of the others.
    """

    train: Annotated[list[str], Field(min_length=1)]
    held_out: Share = 0.01
    tokenizer: Literal["wordpiece", "bpe"] = "wordpiece"
    vocabulary: Count = 32768
    lowercase: bool = True
    tokenizer_characters: Count = 200_000_000
    length: Annotated[int, Field(ge=4)] = 128


class BertRecipe(Recipe):
    """A masked language model from scratch.

    `batch_size` counts rows of `data.length` tokens; `masked` of each row's tokens are predicted; with `corrupt` a tenth of
    them are shown as they are and a tenth as others. `method` is how trees are computed in training (`TRAINING_METHODS` in
    `scattered.py` says what each does); `balance` weighs a term that keeps their load even (the same file; 0, as in the
    paper: none); `compile` compiles the layers.
    """

    task: Literal["ultrafastbert"]
    model: ModelSettings = ModelSettings()
    data: TextSettings
    batch_size: Count = 256
    masked: Share = 0.25
    corrupt: bool = True
    method: Literal["scattered", "auto", "plain", "masked", "sparse", "triton"] = "scattered"
    balance: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"

    @model_validator(mode="after")
    def _fits(self) -> "BertRecipe":
        self.model.config(self.data.vocabulary)
        if self.data.length > self.model.max_positions:
            raise RequestError(
                f"data.length is {self.data.length} and model.max_positions {self.model.max_positions}"
            )
        if self.balance and self.method != "scattered":
            raise RequestError(
                f"balance is {self.balance}, and method {self.method!r} has no such term: use scattered"
            )
        return self

"""What a Transformer recipe may say."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoestring.errors import RequestError, suggest
from shoestring.training.recipe import Recipe, Section
from shoestring.transformer.config import PRESETS, TransformerConfig, preset

__all__ = ["DataSettings", "ModelSettings", "SearchSettings", "TransformerRecipe"]

Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class ModelSettings(Section):
    """A preset and what differs from it (Table 3's columns); None is the preset's own."""

    preset: str = "paper-base"
    layers: Count | None = None
    d_model: Count | None = None
    d_ff: Count | None = None
    heads: Count | None = None
    d_k: Count | None = None
    d_v: Count | None = None
    dropout: Probability | None = None
    positions: Literal["sinusoidal", "learned"] | None = None
    max_positions: Count = 1024

    def config(self, vocab_size: int, label_smoothing: float) -> TransformerConfig:
        """The model's configuration."""
        changes = {
            name: value for name, value in self.model_dump(exclude={"preset"}).items() if value is not None
        }
        return preset(self.preset, vocab_size=vocab_size, label_smoothing=label_smoothing, **changes)


class DataSettings(Section):
    """Corpora (see `transformer/corpus.py` for their names) and how they are cut into pieces."""

    languages: tuple[str, str] = ("source", "target")
    train: Annotated[list[str], Field(min_length=1)]
    validation: str | None = None
    test: dict[str, str] = Field(default_factory=dict)
    vocabulary: Count = 37000
    max_tokens: Count = 256
    max_ratio: Annotated[float, Field(gt=1)] = 3.0
    bpe_dropout: Probability = 0.0
    bpe_variants: Count = 1


class SearchSettings(Section):
    """How the test sets are translated."""

    beam: Count = 4
    length_penalty: Annotated[float, Field(ge=0)] = 0.6
    extra_length: Count = 50


class TransformerRecipe(Recipe):
    """A sequence-to-sequence run. With `schedule: noam` the learning rate is a factor of the paper's (equation 3)."""

    task: Literal["transformer"]
    model: ModelSettings = ModelSettings()
    data: DataSettings
    search: SearchSettings = SearchSettings()
    batch_tokens: Count = 25000
    label_smoothing: Probability = 0.1
    average: Count = 5
    metric: Literal["bleu", "exact", "brackets"] = "bleu"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "noam"] = "noam"
    warmup_steps: Annotated[int, Field(ge=0)] = 4000
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    keep_checkpoints: Count = 5

    @model_validator(mode="after")
    def _fits(self) -> "TransformerRecipe":
        if self.model.preset not in PRESETS:
            raise RequestError(
                f"unknown preset {self.model.preset!r}{suggest(self.model.preset, PRESETS)}; known: {', '.join(PRESETS)}"
            )
        if self.average > self.keep_checkpoints:
            raise RequestError(
                f"average is {self.average} and keep_checkpoints {self.keep_checkpoints}: what is averaged must be kept"
            )
        if self.data.max_tokens > self.model.max_positions:
            raise RequestError(
                f"data.max_tokens is {self.data.max_tokens} and model.max_positions {self.model.max_positions}"
            )
        return self

    def peak_learning_rate(self, d_model: int) -> float:
        """The schedule's highest learning rate."""
        if self.schedule != "noam":
            return self.learning_rate
        return self.learning_rate * d_model**-0.5 * max(1, self.warmup_steps) ** -0.5

"""What the recipe of a fine-tuned classifier may say."""

from typing import Annotated, Literal

from pydantic import Field

from shoestring.training.recipe import Recipe

__all__ = ["ClassificationRecipe"]

Count = Annotated[int, Field(ge=1)]


class ClassificationRecipe(Recipe):
    """A classifier from a pre-trained encoder: `seeds` runs that differ in that alone, in folders inside the run's.

    `model` is a finished masked-language-model run, an HF folder or a hub id; `data` a name of `classification_data.py`.
    Where a text is too long, its last part is cut at `max_tokens`.
    """

    task: Literal["text-classification"]
    model: str
    data: str = "boolq"
    seeds: Count = 3
    max_tokens: Annotated[int, Field(ge=4)] = 256
    batch_size: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"

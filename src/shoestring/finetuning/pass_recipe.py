"""The recipe of look-ahead embeddings (PaSS)."""

from typing import Annotated, Literal

from pydantic import Field

from shoestring.finetuning.texts import Source
from shoestring.training.recipe import Recipe, Section

__all__ = ["Answers", "Data", "PassRecipe"]


class Answers(Section):
    """How the model answers the prompts: up to `max_new_tokens`, a share greedily, the others at a temperature."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    greedy_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 0.8
    batch_size: Annotated[int, Field(ge=1)] = 64


class Data(Section):
    """What to train on: `texts` as they stand, and the model's own answers to `prompts`.

    `held_out` of them (prompts, where there are any, and then answered greedily) are kept for measuring acceptance.
    """

    texts: tuple[Source, ...] = ()
    prompts: tuple[Source, ...] = ()
    held_out: Annotated[int, Field(ge=1)] = 64
    max_tokens: Annotated[int, Field(ge=8)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 24
    insertions: Annotated[int, Field(ge=1)] = 24


class PassRecipe(Recipe):
    """Look-ahead embeddings for a causal LM: `tokens` of them, all that is trained."""

    task: Literal["pass"]
    model: str
    tokens: Annotated[int, Field(ge=1, le=64)] = 6
    initial: Literal["mean", "tokens", "random"] = "mean"
    loss: Literal["kl", "cross_entropy"] = "kl"
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    data: Data
    answers: Answers = Answers()

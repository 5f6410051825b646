"""What a task brings to the training room: its recipe's schema and the function that trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from shoestring.training.folder import RunFolder
from shoestring.training.recipe import RecipeT

__all__ = ["Observer", "Progress", "Task", "silent"]


@dataclass(frozen=True)
class Progress:
    """How far a run is: `values` are the newest of `kind` ("train", "validation", or a stage without steps)."""

    kind: str
    step: int
    steps: int
    values: Mapping[str, Any]
    seconds_left: float | None = None


Observer = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """An observer that shows nothing."""


@dataclass(frozen=True)
class Task(Generic[RecipeT]):
    """`train(recipe, folder, observer)` begins or goes on, and returns the run's result (also in `result.json`)."""

    schema: type[RecipeT]
    train: Callable[[RecipeT, RunFolder, Observer], dict[str, Any]]

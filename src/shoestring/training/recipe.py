"""Recipes: YAML and `key=value` overrides in, a validated pydantic object out.

A task subclasses `Recipe` with what only it needs; together at most about 25 fields. An unknown key is an error that
names the nearest known one.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shoestring.errors import RequestError, suggest

__all__ = ["Recipe", "RecipeT", "Section", "read_recipe", "task_of", "validated"]


class Section(BaseModel):
    """A group of a recipe's fields, written `group: {field: ...}` or `group.field=...`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Recipe(Section):
    """What all training runs have. `learning_rate` is the schedule's peak."""

    task: str
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    compile: bool = False
    steps: Annotated[int, Field(ge=1)]
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "noam"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    log_every: Annotated[int, Field(ge=1)] = 50
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=1)] = 500
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2


RecipeT = TypeVar("RecipeT", bound=Recipe)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's values, with `key=value` overrides (values are YAML; dots reach into sections).

    Raises:
        RequestError: the file cannot be read or is not a mapping, or an override is not `key=value`.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"{path} is not a recipe: it needs `key: value` lines")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RequestError(f"{override!r} is not key=value, as in steps=1000 or model.layers=2")
        try:
            _set(values, key.strip().split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise RequestError(f"{override!r}: the value is not YAML ({error})") from error
    return values


def task_of(values: Mapping[str, Any]) -> str:
    """The recipe's `task`.

    Raises:
        RequestError: it has none.
    """
    task = values.get("task")
    if not isinstance(task, str):
        raise RequestError(f"the recipe's task is {task!r}; it needs a line such as `task: transformer`")
    return task


def validated(schema: type[RecipeT], values: Mapping[str, Any]) -> RecipeT:
    """The values as a recipe of this schema.

    Raises:
        RequestError: an unknown key (the nearest known one is named), a missing one, or a value that cannot be.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise RequestError("; ".join(_explained(schema, error))) from error


def _explained(schema: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        name = ".".join(where)
        if problem["type"] == "extra_forbidden":
            known = _fields(schema, where[:-1])
            yield f"unknown key {name!r}{suggest(where[-1], known)}; known: {', '.join(known)}"
        elif problem["type"] == "missing":
            yield f"the recipe has no {name!r}, which it needs"
        else:
            yield f"{name} = {problem['input']!r}: {problem['msg'][:1].lower() + problem['msg'][1:]}"


def _fields(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        inner = [kind for kind in (annotation, *get_args(annotation)) if _is_section(kind)]
        if inner:
            schema = inner[0]
    return list(schema.model_fields)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for depth, part in enumerate(path[:-1], 1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RequestError(f"{'.'.join(path)}: {'.'.join(path[:depth])} is a value, not a section")
    values[path[-1]] = value

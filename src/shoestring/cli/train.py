"""`shoestring train`: any recipe, resumable."""

from pathlib import Path
from typing import Annotated, Any

import typer

from shoestring.cli import options as opt
from shoestring.cli.terminal import note, print_json, training_line
from shoestring.cli.terminal import output as console
from shoestring.errors import RequestError, suggest

__all__ = ["train"]


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the recipe's.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder. [default: runs/ and the recipe's name]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, if there is one.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Train by a recipe into a run folder: config.yaml, metrics.jsonl, checkpoints, plots, result.json.

    A run that was stopped (Ctrl-C, a kill, a power cut) goes on with --resume, and ends with the weights of a run that was
    not. Several GPUs: torchrun --nproc-per-node 4 -m shoestring train RECIPE.

    Example: shoestring train recipes/multi30k-paper.yaml model.layers=2 --output runs/small
    """
    from shoestring.training.folder import RunFolder
    from shoestring.training.recipe import read_recipe, task_of, validated
    from shoestring.training.task import silent

    values = read_recipe(recipe, overrides or ())
    task = _task(task_of(values))
    settings = validated(task.schema, values)
    path = output or Path("runs") / recipe.stem
    folder = RunFolder.open(path, settings, resume=resume)
    result = folder.result()
    if result is None:
        with training_line() as observer:
            try:
                result = task.train(settings, folder, observer if folder.writes else silent)
            except KeyboardInterrupt:
                note(f"stopped at a whole step; the same command with --resume goes on ({path})")
                raise
    else:
        note(f"{path} is finished; this is what it came to")
    if not folder.writes:  # one of several processes, and not the first: that one speaks
        return
    if json:
        print_json({"run": str(path), **result})
        return
    import yaml

    console().print(
        yaml.safe_dump(_rounded(result), sort_keys=False, allow_unicode=True).rstrip(), markup=False
    )
    note(f"the run is in {path}")


def _rounded(value: Any) -> Any:
    """Numbers as a person reads them."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value


def _task(name: str) -> Any:
    """The tasks that recipes may name."""
    known = ("fff-conversion", "pass", "text-classification", "transformer", "ultrafastbert")
    match name:
        case "pass":
            from shoestring.finetuning import pass_train

            return pass_train.TASK
        case "transformer":
            from shoestring.transformer import training

            return training.TASK
        case "ultrafastbert":
            from shoestring.fastff import bert_training

            return bert_training.TASK
        case "text-classification":
            from shoestring.fastff import classification

            return classification.TASK
        case "fff-conversion":
            from shoestring.fastff import conversion_training

            return conversion_training.TASK
    raise RequestError(f"unknown task {name!r}{suggest(name, known)}; known: {', '.join(known)}")

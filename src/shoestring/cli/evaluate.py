"""`shoestring evaluate`: the quality of a checkpoint on a named task."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from shoestring.cli import options as opt
from shoestring.cli.loading import loaded_translator
from shoestring.cli.terminal import output as console
from shoestring.cli.terminal import print_json, progress
from shoestring.errors import RequestError, suggest

__all__ = ["evaluate"]

_TASKS = ("translation", "parsing")


def evaluate(
    task: Annotated[str, typer.Argument(help=f"{' or '.join(_TASKS)}.", show_default=False)],
    model: Annotated[str, typer.Argument(help="A run's folder, or a model's.", show_default=False)],
    source: Annotated[Path | None, typer.Option(help="translation: sentences, one a line.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="translation: their translations; parsing: trees in Penn brackets, one a line."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="translation: another model, compared by paired bootstrap.")
    ] = None,
    beam: opt.Beam = 4,
    length_penalty: opt.LengthPenalty = 0.6,
    extra_length: opt.ExtraLength = 50,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    json: opt.Json = False,
) -> None:
    """Score a model: sacreBLEU with its signature and chrF, or labelled bracket F1.

    Example: shoestring evaluate translation runs/multi30k-paper --source test.en --reference test.de --against runs/other
    """
    if task not in _TASKS:
        raise RequestError(f"unknown task {task!r}{suggest(task, _TASKS)}; known: {', '.join(_TASKS)}")
    if reference is None or (task == "translation" and source is None):
        raise RequestError(f"{task} needs {'--source and ' if task == 'translation' else ''}--reference")
    search: tuple[Any, ...] = (device, dtype, beam, length_penalty, extra_length)
    if task == "translation":
        assert source is not None
        result = _translation(model, source, reference, against, search)
    else:
        result = _parsing(model, reference, search)
    if json:
        print_json(result)
        return
    for name, value in result.items():
        shown = f"{value:.2f}" if isinstance(value, float) else value
        console().print(f"{name}: {shown}", markup=False)


def _translation(
    model: str, source: Path, reference: Path, against: str | None, search: tuple[Any, ...]
) -> dict[str, Any]:
    from shoestring.evaluation.translation import paired_bootstrap, score_translations
    from shoestring.transformer.corpus import read_lines

    sources, references = read_lines(source), read_lines(reference)
    if len(sources) != len(references):
        raise RequestError(
            f"{source} has {len(sources)} lines and {reference} has {len(references)}: they are not parallel"
        )
    systems = []
    for name in (model, *([against] if against else [])):
        translator, options = loaded_translator(name, *search)
        with progress() as report:
            done = translator.translate(sources, options, lambda at, total: report("translating", at, total))
        systems.append(done.texts)
    result = {"task": "translation", "model": model, **asdict(score_translations(systems[0], references))}
    if against:
        result["against"] = {"model": against, **asdict(paired_bootstrap(systems[1], systems[0], references))}
    return result


def _parsing(model: str, reference: Path, search: tuple[Any, ...]) -> dict[str, Any]:
    from shoestring.transformer.corpus import read_lines
    from shoestring.transformer.parsing.brackets import bracket_score
    from shoestring.transformer.parsing.parser import parse
    from shoestring.transformer.parsing.trees import leaves, read_tree

    trees = [read_tree(line) for line in read_lines(reference) if line.strip()]
    translator, options = loaded_translator(model, *search)
    with progress() as report:
        sentences = [" ".join(leaves(tree)) for tree in trees]
        parses = parse(translator, sentences, options, lambda at, total: report("parsing", at, total))
    return {"task": "parsing", "model": model, **asdict(bracket_score(parses, trees))}

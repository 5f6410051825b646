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

_TASKS = ("translation", "parsing", "masked-lm", "boolq")
_REFERENCED = ("translation", "parsing")


def evaluate(
    task: Annotated[str, typer.Argument(help=f"{', '.join(_TASKS)}.", show_default=False)],
    model: Annotated[str, typer.Argument(help="A run's folder, or a model's.", show_default=False)],
    source: Annotated[Path | None, typer.Option(help="translation: sentences, one a line.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="translation: their translations; parsing: trees in Penn brackets, one a line."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="translation: another model, compared by paired bootstrap.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="masked-lm: text that the model has not seen (.txt, .gz, .xz).")
    ] = None,
    masked: Annotated[float, typer.Option(help="masked-lm: the share of the tokens that is hidden.")] = 0.25,
    length: Annotated[
        int | None,
        typer.Option(
            help="masked-lm: tokens a row; boolq: at most so many of a text. [default: 128 and 256]",
            show_default=False,
        ),
    ] = None,
    beam: opt.Beam = 4,
    length_penalty: opt.LengthPenalty = 0.6,
    extra_length: opt.ExtraLength = 50,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    json: opt.Json = False,
) -> None:
    """Score a model: BLEU and chrF, labelled bracket F1, masked-token perplexity, or accuracy on BoolQ's test part.

    Example: shoestring evaluate translation runs/multi30k-paper --source test.en --reference test.de --against runs/other
    """
    if task not in _TASKS:
        raise RequestError(f"unknown task {task!r}{suggest(task, _TASKS)}; known: {', '.join(_TASKS)}")
    if task not in _REFERENCED:
        result = _encoder(task, model, text, masked, length, device)
        _show(result, json)
        return
    if reference is None or (task == "translation" and source is None):
        raise RequestError(f"{task} needs {'--source and ' if task == 'translation' else ''}--reference")
    search: tuple[Any, ...] = (device, dtype, beam, length_penalty, extra_length)
    if task == "translation":
        assert source is not None
        result = _translation(model, source, reference, against, search)
    else:
        result = _parsing(model, reference, search)
    _show(result, json)


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
        return
    for name, value in result.items():
        shown: Any = _short(value)
        if isinstance(value, tuple):
            shown = "-".join(map(str, map(_short, value)))
        console().print(f"{name}: {shown}", markup=False)


def _short(value: Any) -> Any:
    """A number as a person reads it; anything else as it is."""
    if not isinstance(value, float):
        return value
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def _encoder(
    task: str, model: str, text: Path | None, masked: float, length: int | None, device: str
) -> dict[str, Any]:
    from shoestring.training.trainer import resolved_device

    place = resolved_device(device)
    found: Any
    if task == "boolq":
        from shoestring.fastff.classification import evaluate_classifier

        found = evaluate_classifier(model, "boolq", max_tokens=length or 256, device=place)
    else:
        from shoestring.fastff.masked_scoring import evaluate_masked_lm

        if text is None:
            raise RequestError("masked-lm needs --text")
        if not 0 < masked < 1:
            raise RequestError(f"--masked {masked}: a share between 0 and 1 is needed")
        found = evaluate_masked_lm(model, [str(text)], share=masked, length=length or 128, device=place)
    return {"task": task, "model": model, **asdict(found)}


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

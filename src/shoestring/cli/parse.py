"""`shoestring parse`: sentences to constituency trees through a trained Transformer."""

from pathlib import Path
from typing import Annotated

import typer

from shoestring.cli import options as opt
from shoestring.cli.loading import loaded_translator
from shoestring.cli.terminal import print_json, progress
from shoestring.cli.texts import asked_texts, write_lines

__all__ = ["parse"]


def parse(
    model: Annotated[str, typer.Argument(help="A run's folder, or a model's.", show_default=False)],
    text: Annotated[
        str | None,
        typer.Argument(help="A sentence, words apart; '-' reads standard input.", show_default=False),
    ] = None,
    input: Annotated[Path | None, typer.Option(help="Sentences, one a line.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the trees of --input go.")] = None,
    beam: opt.Beam = 21,
    length_penalty: opt.LengthPenalty = 0.3,
    extra_length: opt.ExtraLength = 300,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    json: opt.Json = False,
) -> None:
    """Write a sentence's tree in Penn brackets; what the model writes is repaired to a tree over the sentence's words.

    Example: shoestring parse runs/parsing "the old dog saw a river ."
    """
    texts = asked_texts("sentence", text, input, output)
    translator, options = loaded_translator(model, device, dtype, beam, length_penalty, extra_length)
    from shoestring.transformer.parsing.parser import parse as parse_sentences
    from shoestring.transformer.parsing.trees import bracketed

    with progress() as report:
        trees = parse_sentences(translator, texts, options, lambda at, total: report("parsing", at, total))
    lines = [bracketed(tree) for tree in trees]
    if json and output is None:
        print_json({"trees": lines})
        return
    write_lines(lines, output)
    if json:
        print_json({"input": str(input), "output": str(output), "sentences": len(texts)})

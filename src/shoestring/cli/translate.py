"""`shoestring translate`: texts through a trained Transformer."""

from pathlib import Path
from typing import Annotated

import typer

from shoestring.cli import options as opt
from shoestring.cli.loading import loaded_translator
from shoestring.cli.terminal import note, print_json, progress
from shoestring.cli.texts import asked_texts, write_lines
from shoestring.errors import RequestError

__all__ = ["translate"]


def translate(
    model: Annotated[str, typer.Argument(help="A run's folder, or a model's.", show_default=False)],
    text: Annotated[
        str | None, typer.Argument(help="A sentence; '-' reads standard input.", show_default=False)
    ] = None,
    input: Annotated[Path | None, typer.Option(help="Sentences, one a line (.gz and .xz too).")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the translations of --input go.")] = None,
    beam: opt.Beam = 4,
    length_penalty: opt.LengthPenalty = 0.6,
    extra_length: opt.ExtraLength = 50,
    attention: Annotated[
        Path | None, typer.Option(help="Draw the attention of a single text here (.png or .html).")
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    json: opt.Json = False,
) -> None:
    """Translate with a model that `shoestring train` made; an empty line stays empty.

    Example: shoestring translate runs/multi30k-paper "A dog runs through the snow."
    """
    texts = asked_texts("sentence", text, input, output)
    if attention is not None and len(texts) != 1:
        raise RequestError(f"--attention draws one text, and there are {len(texts)}")
    translator, options = loaded_translator(model, device, dtype, beam, length_penalty, extra_length)
    with progress() as report:
        done = translator.translate(texts, options, lambda at, total: report("translating", at, total))
    if attention is not None:
        from shoestring.transformer.heatmaps import draw_attention

        note(f"attention: {draw_attention(translator.attention(texts[0], done.texts[0]), attention)}")
    speed = {
        "seconds": round(done.seconds, 3),
        "sentences_per_second": round(done.sentences_per_second, 1),
        "tokens_per_second": round(done.tokens_per_second, 1),
    }
    if json:
        if output is not None:
            write_lines(done.texts, output)
            print_json({"input": str(input), "output": str(output), "sentences": len(texts), **speed})
        else:
            print_json({"translations": done.texts, "scores": done.scores, **speed})
        return
    write_lines(done.texts, output)
    note(
        f"{len(texts)} sentences in {done.seconds:.2f} s, {done.sentences_per_second:.1f} sentences/s, "
        f"{done.tokens_per_second:.0f} tokens/s"
    )

"""`shoestring generate`: text from a prompt, or from a file of prompts."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shoestring.cli import options as opt
from shoestring.cli.loading import loaded
from shoestring.cli.prompts import as_prompt, check_text, read_text
from shoestring.cli.terminal import TextStream, note, print_json
from shoestring.errors import RequestError

__all__ = ["generate"]


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from standard input.", show_default=False)
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help='JSON Lines with a "prompt" (text) or "messages" (a chat) each.'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the results of --input go, one line each, in its order. Run again after an interruption: "
            "finished lines are kept.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the text as it stands; use no chat template.")
    ] = False,
    model: opt.Model = opt.DEFAULT_MODEL,
    decoding: opt.Decoding = "auto",
    max_new_tokens: opt.MaxNewTokens = 256,
    stop: opt.Stop = None,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    adapter: opt.Adapter = None,
    look_ahead: opt.LookAhead = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    json: opt.Json = False,
) -> None:
    """Generate text from a prompt, or from a file of prompts.

    Prompts go through the model's chat template where it has one; --raw leaves them as they are.

    Example: shoestring generate "Why is the sky blue?" --decoding lookahead --max-new-tokens 100

    Example: shoestring generate --input prompts.jsonl --output answers.jsonl
    """
    if (prompt is None) == (input is None):
        raise RequestError('give one prompt ("-" for standard input), or a file of prompts with --input')
    if output is not None and input is None:
        raise RequestError("--output belongs to --input; a single text is printed")
    options: dict[str, Any] = {
        "decoding": decoding,
        "max_new_tokens": max_new_tokens,
        "stop": stop or (),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    source: dict[str, Any] = {
        "revision": revision,
        "adapter": adapter,
        "look_ahead": look_ahead,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
    }
    if input is not None:
        from shoestring.cli.files import generate_file

        generate_file(input, output, model, source, options, raw=raw, as_json=json)
        return
    text = read_text(sys.stdin) if prompt == "-" else str(prompt)
    check_text(text)
    with loaded(model, decoding=(decoding,), **source) as language_model:
        asked = as_prompt(language_model, text, raw)
        if json:
            print_json(language_model.generate(asked, **options).as_dict())
            return
        stream, generation = TextStream(), None
        try:
            for piece in language_model.stream(asked, **options):
                stream.write(piece.text, piece.drafted)
                generation = piece.generation
        finally:
            stream.end()
    if generation is not None:
        for line in filter(None, [generation.note, generation.summary]):
            note(line)

"""The options that commands share: the same names for the same things as in the Python API."""

from typing import Annotated

import typer

from shoestring.hub.catalogue import BUNDLED

__all__ = [
    "DEFAULT_MODEL",
    "Adapter",
    "Beam",
    "Decoding",
    "Device",
    "Dtype",
    "ExtraLength",
    "Json",
    "LengthPenalty",
    "LookAhead",
    "MaxNewTokens",
    "MinP",
    "Model",
    "Quantize",
    "RepetitionPenalty",
    "Revision",
    "Seed",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
]

DEFAULT_MODEL = next(iter(BUNDLED))

_MODEL, _SAMPLING = "Model", "Sampling"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A hub id, a folder of safetensors, a .gguf file, or a bundled name.",
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=_MODEL)
]
Adapter = Annotated[
    str | None,
    typer.Option(help="A PEFT adapter (folder or hub id), merged into the weights.", rich_help_panel=_MODEL),
]
LookAhead = Annotated[
    str | None,
    typer.Option(
        help="Look-ahead embeddings for --decoding pass and auto: a file or a training run's folder; none: not even "
        "those that come with the default model.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=_MODEL)]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (a GGUF's own types on a CPU; else bfloat16 where the hardware computes in it, or float32), float32, "
        "bfloat16 or float16.",
        rich_help_panel=_MODEL,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8 or int4: weights are rounded at load (on a CPU once, and kept in the cache).",
        rich_help_panel=_MODEL,
    ),
]
Decoding = Annotated[
    str,
    typer.Option(
        "--decoding",
        "-d",
        help="autoregressive, lookahead, ngram, draft_model(model=NAME), pass or auto; settings in brackets, as in "
        "lookahead(window=15,ngram=5,guesses=15).",
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="The most tokens of a text.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float,
    typer.Option(
        help="Keep the likeliest tokens that together reach this probability.", rich_help_panel=_SAMPLING
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Keep tokens at least this fraction as likely as the likeliest.", rich_help_panel=_SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: seen tokens become less likely.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int, typer.Option(help="The same seed gives the same text, whatever decodes.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends the text (left out of it); may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Beam = Annotated[int, typer.Option(min=1, help="Hypotheses kept for each sentence; 1 is greedy.")]
LengthPenalty = Annotated[
    float, typer.Option(min=0.0, help="The exponent of the length by which scores are divided.")
]
ExtraLength = Annotated[int, typer.Option(min=1, help="The most tokens beyond the source's.")]

"""`shoestring compare`: decoding strategies side by side on the same prompts."""

import json as jsonlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import options as opt
from shoestring.cli.loading import loaded
from shoestring.cli.prompts import as_prompt, check_text, read_rows
from shoestring.cli.terminal import TextStream, note, output, print_json
from shoestring.errors import RequestError

if TYPE_CHECKING:
    from shoestring.evaluation.comparing import Comparison

__all__ = ["compare"]


def compare(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON Lines with a "prompt" or "messages" each.')
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            "--decoding",
            "-d",
            help="A strategy, with settings in brackets; may be repeated. [default: lookahead, ngram, auto]",
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(help="Decode so many of the prompts at once (1 to 8), each accepting its own tokens."),
    ] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write each step's drafted and accepted rows by source here, as JSON Lines."),
    ] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    max_new_tokens: opt.MaxNewTokens = 128,
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
    """Decode the same prompts with several strategies and say what each gains and whether its text is the same.

    Tokens accepted beyond the first of a step are tinted. The last column says whether the tokens equal plain
    decoding's, or where they part and how near the two tokens' logits were (in bfloat16 near ties may part). With
    --batch, tokens/step are a sequence's own, tokens/s those of all sequences that are decoded at once, and ratios are
    over plain decoding of the same batch.

    Example: shoestring compare "Write a haiku about the sea." -d lookahead -d "lookahead(window=15,ngram=5,guesses=15)"
    """
    if bool(prompt) == (prompts is not None):
        raise RequestError("give prompts as arguments, or a file of them with --prompts")
    for text in prompt or ():
        check_text(text)
    texts: list[Any] = list(prompt or ()) if prompts is None else [row.prompt for row in read_rows(prompts)]
    names = decoding or ["lookahead", "ngram", "auto"]
    source: dict[str, Any] = {
        "revision": revision,
        "adapter": adapter,
        "look_ahead": look_ahead,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
    }
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": stop or (),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    with ExitStack() as stack:
        language_model = stack.enter_context(loaded(model, decoding=tuple(names), batch=batch, **source))
        from shoestring.evaluation.comparing import compare as compare_strategies

        asked = [as_prompt(language_model, text, raw) for text in texts]
        view = _View(texts, quiet=json, trace=stack.enter_context(trace.open("w")) if trace else None)
        comparison = compare_strategies(language_model, asked, names, view.show, batch=batch, **options)
    if json:
        settings = {name: value for name, value in options.items() if name != "stop"}
        print_json(
            {"model": model, "weights": language_model.runner.weights, "prompts": len(texts), "batch": batch}
            | {"settings": settings, "strategies": comparison.as_json()}
        )
    else:
        _print_table(comparison)


class _View:
    """The texts as they come, each under its strategy's name; and the trace file."""

    def __init__(self, prompts: list[Any], quiet: bool, trace: Any) -> None:
        self._prompts, self._quiet, self._trace = prompts, quiet, trace
        self._prompt = -1
        self._decoding = ""
        self._stream = TextStream()

    def show(self, index: int, decoding: str, piece: Any) -> None:
        if self._trace is not None and piece.trace is not None:
            sources = {name: {"drafted": d, "accepted": a} for name, (d, a) in piece.trace.items()}
            row = {"prompt": index, "decoding": decoding, "step": piece.step, "sources": sources}
            self._trace.write(jsonlib.dumps(row) + "\n")
        if self._quiet:
            return
        if index != self._prompt:
            prompt = self._prompts[index]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            title = " ".join(f"{index + 1}. {text}".split())
            output().print(f"\n-- {title[:90]}{'...' if len(title) > 90 else ''}", style="dim", markup=False)
            self._prompt, self._decoding = index, ""
        if decoding != self._decoding:
            output().print(f"\n{decoding}", style="bold", markup=False)
            self._decoding = decoding
        self._stream.write(piece.text, piece.drafted)
        if piece.generation is not None:
            self._stream.end()


def _print_table(comparison: "Comparison") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("strategy")
    for column in ("tokens/step", "tokens/s", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("tokens")
    summaries = comparison.summaries()
    for row in summaries:
        numbers = (f"{row.tokens_per_step:.2f}", f"{row.tokens_per_second:.1f}", f"{row.ratio:.2f}x")
        table.add_row(row.decoding, *numbers, row.verdict if row is not summaries[0] else "the baseline")
    output().print()
    output().print(table)
    for row in summaries:
        if row.note:
            note(row.note)

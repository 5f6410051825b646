"""`shoestring chat`: a conversation in the terminal."""

import sys
from typing import Annotated, Any

import typer

from shoestring.cli import options as opt
from shoestring.cli.loading import loaded
from shoestring.cli.terminal import TextStream, note, print_json
from shoestring.errors import RequestError

__all__ = ["chat"]

_HELP = "/clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    system: Annotated[str | None, typer.Option(help="What the system's turn says.")] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    decoding: opt.Decoding = "auto",
    max_new_tokens: opt.MaxNewTokens = 512,
    stop: opt.Stop = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; the model's own setting if left out.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="As in generate; the model's own if left out.")] = None,
    top_p: Annotated[float | None, typer.Option(help="As in generate; the model's own if left out.")] = None,
    min_p: opt.MinP = 0.0,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="As in generate; the model's own if left out.")
    ] = None,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    adapter: opt.Adapter = None,
    look_ahead: opt.LookAhead = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    json: opt.Json = False,
) -> None:
    """Chat with a model; tokens accepted beyond the first of a step are tinted.

    Each turn reuses the cached conversation before it. With --json the turns are read from standard input, one a
    line, and the whole conversation is printed as one JSON object at its end.

    Example: shoestring chat --decoding lookahead --temperature 0.7
    """
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    source: dict[str, Any] = {
        "revision": revision,
        "adapter": adapter,
        "look_ahead": look_ahead,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
    }
    with loaded(model, decoding=(decoding,), **source) as language_model:
        if not language_model.has_chat_template:
            raise RequestError(
                f"{model} has no chat template; shoestring generate --raw completes text with it"
            )
        own = language_model.generation_defaults
        options: dict[str, Any] = {
            **own,
            **{name: value for name, value in given.items() if value is not None},
        }
        options |= {
            "decoding": decoding,
            "max_new_tokens": max_new_tokens,
            "stop": stop or (),
            "min_p": min_p,
            "seed": seed,
        }
        taken = {name: value for name, value in own.items() if given.get(name) is None}
        if taken:
            note("the model's own settings: " + ", ".join(f"{name}={value}" for name, value in taken.items()))
        conversation = _Conversation(language_model, options, system)
        if json:
            for line in sys.stdin:
                if line.strip():
                    conversation.answer(line.rstrip("\n"))
            print_json({"messages": conversation.messages, "generations": conversation.records})
        else:
            _converse(conversation)


class _Conversation:
    """The messages so far, and the answers' records."""

    def __init__(self, model: Any, options: dict[str, Any], system: str | None) -> None:
        self._model, self._options, self._system = model, options, system
        self.records: list[dict[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str, stream: TextStream | None = None) -> None:
        """Add a user's turn and the model's; an interrupted answer stays as far as it came."""
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            for piece in self._model.stream(self.messages, **self._options):
                said += piece.text
                if stream is not None:
                    stream.write(piece.text, piece.drafted)
                if piece.generation is not None:
                    self.records.append(piece.generation.as_dict())
        except RequestError:
            self.messages.pop()
            raise
        finally:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.append({"role": "assistant", "content": said})


def _converse(conversation: _Conversation) -> None:
    note(_HELP)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            conversation.clear()
            note("a new conversation")
        elif text.startswith("/"):
            note(_HELP)
        elif text:
            stream = TextStream()
            try:
                conversation.answer(text, stream)
            except KeyboardInterrupt:
                note(" (stopped)")
            except RequestError as error:
                note(f"{error}; /clear begins anew")
            stream.end()

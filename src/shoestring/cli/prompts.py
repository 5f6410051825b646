"""Prompts as people give them: text, standard input, JSON Lines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from shoestring.errors import RequestError

if TYPE_CHECKING:
    from shoestring.generation import Prompt
    from shoestring.model import LanguageModel

__all__ = ["Row", "as_prompt", "check_text", "read_rows", "read_text"]


@dataclass(frozen=True)
class Row:
    """A line of a prompt file: its number, its prompt (text or messages), and its `id` if it has one."""

    line: int
    prompt: "str | list[Mapping[str, Any]]"
    id: Any = None


def as_prompt(model: "LanguageModel", prompt: "str | list[Mapping[str, Any]]", raw: bool) -> "Prompt":
    """A text as a user's turn where the model has a chat template; as it stands otherwise, or if `raw`."""
    if isinstance(prompt, str) and model.has_chat_template and not raw:
        return [{"role": "user", "content": prompt}]
    return prompt


def check_text(prompt: str) -> None:
    """Refuse a prompt without text, before a model is loaded for it."""
    if not prompt.strip():
        raise RequestError("the prompt is empty; give it some text")


def read_text(stream: TextIO) -> str:
    """All of standard input, without its last line break."""
    try:
        return stream.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text (byte {error.start})") from error


def read_rows(path: Path) -> list[Row]:
    """The prompts of a JSON Lines file; blank lines are skipped.

    Raises:
        RequestError: the file cannot be read, or a line (by its number) is not a prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RequestError(f"{path}, line {line}: not UTF-8 text (byte {error.start})") from error
    rows = [_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise RequestError(f"{path} holds no prompts; it needs one JSON object a line")
    return rows


def _row(path: Path, number: int, line: str) -> Row:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON ({error})") from error
    match value:
        case {"prompt": str(prompt)} if prompt.strip():
            return Row(number, prompt, value.get("id"))
        case {"messages": [*messages]} if messages:
            for message in messages:
                if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                    raise RequestError(f"{where}: a message needs a role and content")
            return Row(number, messages, value.get("id"))
    raise RequestError(f'{where}: needs a "prompt" with text or "messages" with a chat')

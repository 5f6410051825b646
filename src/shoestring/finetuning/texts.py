"""Texts and prompts from files: plain text, JSON Lines, packed or not, a named set of `SHOESTRING_DATA`, or the hub's."""

import gzip
import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from shoestring.errors import MissingDependencyError, RequestError
from shoestring.evaluation.prompts import data_folder
from shoestring.training.recipe import Section

__all__ = ["Source", "read_texts"]

_FIELDS = ("text", "prompt", "instruction", "question", "messages")


class Source(Section):
    """Where texts come from.

    `path` is a file (.txt: one text a paragraph; .jsonl; either packed as .gz or .xz), such a file below `SHOESTRING_DATA`,
    or `hf:NAME` or `hf:NAME:SPLIT`, a data set of the hub. `field` names the column; None: the first of text, prompt,
    instruction, question, messages that is there. `most` takes only so many.
    """

    path: str
    field: str | None = None
    most: Annotated[int | None, Field(ge=1)] = None


def read_texts(source: Source) -> list[str]:
    """The texts of a source, without blank ones.

    Raises:
        RequestError: it is not there, cannot be read, or holds nothing.
        MissingDependencyError: `datasets` is not installed.
    """
    rows = _hub_rows(source) if source.path.startswith("hf:") else _file_rows(source)
    texts = list(islice((text for text in rows if text.strip()), source.most))
    if not texts:
        raise RequestError(f"{source.path} holds no texts")
    return texts


def _file_rows(source: Source) -> Iterator[str]:
    path = _found(source.path)
    kind = path.with_suffix("").suffix if path.suffix in (".gz", ".xz") else path.suffix
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            if kind in (".jsonl", ".json"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of(_parsed(line, path, number), source, f"{path}, line {number}")
            else:
                yield from _paragraphs(file)
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error


def _found(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    below = data_folder() / name
    if not below.is_file():
        raise RequestError(f"there is no file {name!r}, neither here nor in SHOESTRING_DATA")
    return below


def _paragraphs(lines: Any) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip("\n")


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RequestError(f"{path}, line {number}: not JSON ({error})") from error


def _text_of(row: Any, source: Source, where: str) -> str:
    fields = [source.field] if source.field is not None else list(_FIELDS)
    value = next((row[field] for field in fields if isinstance(row, dict) and field in row), None)
    if isinstance(value, list):  # a chat: its first user turn
        value = next((turn["content"] for turn in value if turn.get("role") == "user"), None)
    if not isinstance(value, str):
        raise RequestError(f"{where}: no text in {' or '.join(map(repr, fields))}")
    return value


def _hub_rows(source: Source) -> Iterator[str]:
    name, _, split = source.path.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError(
            "hub data sets need datasets: pip install 'shoestring[train]'"
        ) from error
    try:
        rows = load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # whatever the hub's client raises, it is this name that it could not get
        raise RequestError(f"the data set {name!r} could not be opened: {error}") from error
    for number, row in enumerate(rows, 1):
        yield _text_of(dict(row), source, f"{name}, row {number}")

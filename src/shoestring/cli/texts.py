"""Texts in, texts out: one on the command line or standard input, or a file of lines."""

import sys
from collections.abc import Sequence
from pathlib import Path

from shoestring.cli.prompts import read_text
from shoestring.errors import RequestError

__all__ = ["asked_texts", "write_lines"]


def asked_texts(what: str, text: str | None, input: Path | None, output: Path | None) -> list[str]:
    """The texts that a command was given.

    Raises:
        RequestError: none or two ways at once, or a file that cannot be read.
    """
    from shoestring.transformer.corpus import read_lines

    if (text is None) == (input is None):
        raise RequestError(f"give a {what} ('-' reads standard input), or a file of lines with --input")
    if output is not None and input is None:
        raise RequestError("--output belongs to --input; a single text is printed")
    if input is not None:
        lines = read_lines(input)
        if not lines:
            raise RequestError(f"{input} is empty")
        return lines
    given = read_text(sys.stdin) if text == "-" else str(text)
    if not given.strip():
        raise RequestError(f"the {what} is empty; give it some text")
    return given.split("\n") if text == "-" else [given]


def write_lines(lines: Sequence[str], output: Path | None) -> None:
    """To the file, or to standard output."""
    content = "".join(line.replace("\n", " ") + "\n" for line in lines)
    if output is None:
        sys.stdout.write(content)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(content, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{output} cannot be written: {error.strerror or error}") from error

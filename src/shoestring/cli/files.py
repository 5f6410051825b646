"""`generate --input`: many prompts at once, results in the file's order, resumable line by line."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from shoestring.cli.loading import loaded
from shoestring.cli.prompts import Row, as_prompt, read_rows
from shoestring.cli.terminal import note, print_json, progress
from shoestring.errors import RequestError

if TYPE_CHECKING:
    from shoestring.model import LanguageModel

__all__ = ["generate_file"]


def generate_file(
    source: Path,
    target: Path | None,
    model: str,
    loading: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Generate for every line of `source`; results go to `target` (else stdout) as JSON Lines."""
    if as_json and target is None:
        raise RequestError("--json prints a summary of --input; say where the results go with --output")
    rows = read_rows(source)
    settings = {"model": model, "raw": raw, **loading, **options}
    requests = [_fingerprint(row, settings) for row in rows]
    done = _finished_lines(target, requests) if target is not None else 0
    if done < len(rows):
        with loaded(model, decoding=(options["decoding"],), **loading) as language_model:
            prompts = [_encoded(language_model, source, row, raw) for row in rows[done:]]
            with _opened(target) as file, progress() as report:
                _write_in_order(file, language_model, prompts, rows[done:], requests[done:], options, report)
    elif target is not None:
        note(f"{target} is complete: all {len(rows)} results are there")
    if as_json:
        print_json({"input": str(source), "output": str(target), "results": len(rows), "kept": done})


def _encoded(model: "LanguageModel", source: Path, row: Row, raw: bool) -> list[int]:
    """Token ids; what is wrong with a prompt is said before any work is done."""
    try:
        return model.check(model.encode(as_prompt(model, row.prompt, raw)))
    except RequestError as error:
        raise RequestError(f"{source}, line {row.line}: {error}") from error


def _write_in_order(
    file: TextIO,
    model: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    requests: Sequence[str],
    options: Mapping[str, Any],
    report: Any,
) -> None:
    waiting: dict[int, str] = {}
    written = 0
    report("generating", 0, len(rows))
    for count, (index, generation) in enumerate(model.generate_each(prompts, **options), 1):
        head = {} if rows[index].id is None else {"id": rows[index].id}
        line = {**head, **generation.as_dict(), "line": rows[index].line, "request": requests[index]}
        waiting[index] = json.dumps(line, ensure_ascii=False) + "\n"
        while written in waiting:
            file.write(waiting.pop(written))
            file.flush()
            written += 1
        report("generating", count, len(rows))


@contextmanager
def _opened(target: Path | None) -> Iterator[TextIO]:
    if target is None:
        yield sys.stdout
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("a", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{target} cannot be written: {error.strerror or error}") from error
    with file:
        yield file


def _fingerprint(row: Row, settings: Mapping[str, Any]) -> str:
    """What a result answers: the prompt and everything that decides its text."""
    content = json.dumps([row.prompt, settings], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _finished_lines(target: Path, requests: Sequence[str]) -> int:
    """How many results `target` already holds; a half-written last line is cut off.

    Raises:
        RequestError: it holds results of other prompts or settings, or something else altogether.
    """
    if not target.is_file():  # not there yet, or a device such as /dev/stdout
        return 0
    try:
        content = target.read_bytes()
    except OSError as error:
        raise RequestError(f"{target} cannot be read: {error.strerror or error}") from error
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            request = json.loads(line)["request"]
        except (ValueError, KeyError, TypeError):
            request = None
        if number > len(requests) or request != requests[number - 1]:
            raise RequestError(
                f"{target}, line {number}: not a result of these prompts and settings; "
                "remove the file or name another --output"
            )
    if len(whole) < len(content):
        os.truncate(target, len(whole))
    return len(lines)

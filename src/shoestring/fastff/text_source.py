"""Documents from wherever text lies: files of plain text (.txt, .gz, .xz) or an HF data set.

- `corpus/english.txt.xz`: one paragraph a line, a blank line between documents; a file without blank lines is one document
- `lines:reviews.txt`: each line is a document
- `hf:wikimedia/wikipedia/20231101.en/train`: data set, configuration, split, streamed; rows with a `text`
"""

import gzip
import hashlib
import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shoestring.errors import MissingDependencyError, RequestError

__all__ = ["fingerprint", "located", "read_documents"]

_LONGEST = 4000  # characters of one paragraph; longer lines are cut between words
_SAMPLED = 2**20


def located(path: str) -> Path:
    """A file as it stands, or in the folder that `SHOESTRING_DATA` names.

    Raises:
        RequestError: it is in neither.
    """
    if Path(path).is_file():
        return Path(path)
    folder = os.environ.get("SHOESTRING_DATA", "")
    if folder and (Path(folder) / path).is_file():
        return Path(folder) / path
    where = f"and not in SHOESTRING_DATA ({folder})" if folder else "and SHOESTRING_DATA is not set"
    raise RequestError(f"{path} is not there, {where}")


def read_documents(sources: Sequence[str]) -> Iterator[list[str]]:
    """The documents of all sources, each as its paragraphs; nothing is kept in memory.

    Raises:
        RequestError: a file that is not there, is torn, or is not UTF-8.
        MissingDependencyError: `datasets` is needed and not installed.
    """
    for source in sources:
        if source.startswith("hf:"):
            yield from _from_hub(source)
        elif source.startswith("lines:"):
            for line in _lines(located(source.removeprefix("lines:"))):
                if line:
                    yield list(_cut(line))
        else:
            document: list[str] = []
            for line in _lines(located(source)):
                if line:
                    document.extend(_cut(line))
                elif document:
                    yield document
                    document = []
            if document:
                yield document


def fingerprint(sources: Sequence[str]) -> str:
    """A hash of what the sources are: names, sizes, and the first and last MiB of each file."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.encode() + b"\0")
        if not source.startswith("hf:"):
            path = located(source.removeprefix("lines:"))
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED))
                file.seek(max(0, size - _SAMPLED))
                digest.update(file.read())
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[str]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    number = 0
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}, line {number}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except (EOFError, lzma.LZMAError) as error:
        raise RequestError(f"{path} is not a whole {path.suffix} file: {error}") from error


def _cut(line: str) -> Iterator[str]:
    """The line in pieces that a tokenizer takes at once, cut between words where there are any."""
    while len(line) > _LONGEST:
        at = line.rfind(" ", 1, _LONGEST)
        at = _LONGEST if at < 0 else at
        yield line[:at]
        line = line[at:].lstrip()
    if line:
        yield line


def _from_hub(source: str) -> Iterator[list[str]]:
    parts = source.removeprefix("hf:").split("/")
    if len(parts) < 3:
        raise RequestError(
            f"{source!r} is not hf:ID/CONFIGURATION/SPLIT, as in hf:wikimedia/wikipedia/20231101.en/train"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError("HF data sets need datasets: pip install 'shoestring[train]'") from error
    for row in load_dataset("/".join(parts[:-2]), parts[-2], split=parts[-1], streaming=True):
        text = row.get("text")
        if not isinstance(text, str):
            raise RequestError(f"{source}: its rows have no `text`; they have {', '.join(row)}")
        document = [piece for line in text.splitlines() if line.strip() for piece in _cut(line.strip())]
        if document:
            yield document

"""Pairs of sentences from wherever they lie: two parallel files, a TSV (plain, .gz, .xz), an HF data set, a generator.

A corpus is named by one string, in which `[a:b]` at the end takes a slice of the pairs:

- `folder/train.{}`: a file for each language, `{}` standing for its name
- `folder/pairs.en-de.tsv.xz`: source, tab, target (swapped where the name has the languages the other way round)
- `hf:wmt/wmt14/de-en/train`: data set, configuration, split; rows with a `translation` of both languages
- `generated:copy`, `generated:reverse`, `generated:trees`: made up, pair n always the same
"""

import gzip
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.errors import MissingDependencyError, RequestError
from shoestring.transformer.generated import GENERATORS

__all__ = ["Pair", "read_corpus", "read_lines"]

Pair = tuple[str, str]
_SLICE = re.compile(r"^(.*)\[(\d*):(\d*)\]$")


@dataclass(frozen=True)
class _Name:
    body: str
    start: int
    stop: int | None


def read_corpus(name: str, languages: Sequence[str]) -> list[Pair]:
    """The pairs of a corpus, stripped of white space at the ends.

    Raises:
        RequestError: no such file, files of different lengths, a line without its tab, not UTF-8, an empty slice.
    """
    wanted = _parsed(name)
    kind, _, rest = wanted.body.partition(":")
    if kind == "generated":
        return list(_generated(wanted, rest))
    if kind == "hf":
        pairs = _from_hub(rest, languages)
    elif "{}" in wanted.body:
        pairs = _from_two_files(wanted.body, languages)
    elif ".tsv" in Path(wanted.body).name:
        pairs = _from_tsv(wanted.body, languages)
    else:
        raise RequestError(
            f"corpus {name!r}: give files as folder/name.{{}} ({{}} stands for {' and '.join(languages)}), a .tsv, "
            ".tsv.gz or .tsv.xz, hf:ID/CONFIGURATION/SPLIT, or generated:KIND"
        )
    pairs = [(source.strip(), target.strip()) for source, target in pairs[wanted.start : wanted.stop]]
    if not pairs:
        raise RequestError(f"corpus {name!r} has no pairs (in that slice)")
    return pairs


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, unpacked if it is .gz or .xz; only \\n ends a line.

    Raises:
        RequestError: it cannot be read or is not UTF-8 text.
    """
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except (EOFError, lzma.LZMAError) as error:
        raise RequestError(f"{path} is not a whole {path.suffix} file: {error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RequestError(f"{path}, line {line}: not UTF-8 text (byte {error.start})") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _parsed(name: str) -> _Name:
    if match := _SLICE.match(name):
        return _Name(match[1], int(match[2] or 0), int(match[3]) if match[3] else None)
    return _Name(name, 0, None)


def _located(path: str) -> Path:
    """A path as it stands, or in the folder that `SHOESTRING_DATA` names."""
    if Path(path).is_file() or Path(path).is_absolute():
        return Path(path)
    folder = os.environ.get("SHOESTRING_DATA", "")
    if folder and (Path(folder) / path).is_file():
        return Path(folder) / path
    where = f"and not in SHOESTRING_DATA ({folder})" if folder else "and SHOESTRING_DATA is not set"
    raise RequestError(f"{path} is not there, {where}")


def _from_two_files(pattern: str, languages: Sequence[str]) -> list[Pair]:
    paths = [_located(pattern.replace("{}", language)) for language in languages]
    sides = [read_lines(path) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise RequestError(
            f"{paths[0]} has {len(sides[0])} lines and {paths[1]} has {len(sides[1])}: they are not parallel"
        )
    return list(zip(*sides, strict=True))


def _from_tsv(name: str, languages: Sequence[str]) -> list[Pair]:
    path = _located(name)
    swapped = f"{languages[1]}-{languages[0]}" in path.name
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise RequestError(
                f"{path}, line {number}: {len(fields) - 1} tabs; a line is source, tab, target"
            )
        pairs.append((fields[1], fields[0]) if swapped else (fields[0], fields[1]))
    return pairs


def _from_hub(name: str, languages: Sequence[str]) -> list[Pair]:
    parts = name.split("/")
    if len(parts) < 3:
        raise RequestError(f"'hf:{name}' is not hf:ID/CONFIGURATION/SPLIT, as in hf:wmt/wmt14/de-en/train")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError("HF data sets need datasets: pip install 'shoestring[train]'") from error
    rows = load_dataset("/".join(parts[:-2]), parts[-2], split=parts[-1])
    source, target = languages
    return [(row["translation"][source], row["translation"][target]) for row in rows]


def _generated(wanted: _Name, kind: str) -> Iterator[Pair]:
    if kind not in GENERATORS:
        raise RequestError(f"generated:{kind} is not known; known: {', '.join(GENERATORS)}")
    if wanted.stop is None or wanted.stop <= wanted.start:
        raise RequestError(f"generated:{kind} has no end; say how many, as in generated:{kind}[0:20000]")
    for index in range(wanted.start, wanted.stop):
        yield GENERATORS[kind](index)

"""Labelled texts for fine-tuning, by name: `boolq`, a GLUE task (`glue/rte`), or a file of one's own.

BoolQ is split here, by a hash of the passage: 80% train, 10% validation, 10% test, and no passage in two parts. GLUE's own
validation part is the test part (its test labels are secret), as in the paper; a tenth of its training part validates.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoestring.errors import MissingDependencyError, RequestError, suggest
from shoestring.fastff.text_source import located

__all__ = ["GLUE", "PARTS", "LabelledText", "TextSet", "read_text_set"]

PARTS = ("train", "validation", "test")
# The fields of the texts, and the test part.
GLUE: dict[str, tuple[tuple[str, ...], str]] = {
    "cola": (("sentence",), "validation"),
    "sst2": (("sentence",), "validation"),
    "mrpc": (("sentence1", "sentence2"), "validation"),
    "qqp": (("question1", "question2"), "validation"),
    "mnli": (("premise", "hypothesis"), "validation_matched"),
    "qnli": (("question", "sentence"), "validation"),
    "rte": (("sentence1", "sentence2"), "validation"),
}
_BOOLQ_FILE = "qa/boolq.jsonl.gz"


@dataclass(frozen=True)
class LabelledText:
    """One text or two, and the number of their class."""

    texts: tuple[str, ...]
    label: int


@dataclass
class TextSet:
    """The three parts, the classes' names, and where they came from."""

    classes: list[str]
    source: str
    parts: dict[str, list[LabelledText]] = field(default_factory=lambda: {part: [] for part in PARTS})


def read_text_set(name: str) -> TextSet:
    """A set by its name.

    `boolq` is `qa/boolq.jsonl.gz` in `SHOESTRING_DATA` or, where it is not, `google/boolq` by `datasets`. A file is .jsonl
    (or .jsonl.gz) with `text`, perhaps `text2`, and `label`; it is split by a hash of the last text.

    Raises:
        RequestError: no such set or file, a row without its fields, or a part without rows.
        MissingDependencyError: `datasets` is needed and not installed.
    """
    if name == "boolq":
        found = _boolq()
    elif name.startswith("glue/"):
        found = _glue(name.removeprefix("glue/"))
    elif name.endswith((".jsonl", ".jsonl.gz")):
        found = _from_file(name)
    else:
        raise RequestError(
            f"unknown data set {name!r}{suggest(name, ['boolq', *(f'glue/{task}' for task in GLUE)])}; known: boolq, "
            f"{', '.join(f'glue/{task}' for task in GLUE)}, or a .jsonl file"
        )
    for part, rows in found.parts.items():
        if not rows:
            raise RequestError(f"{name}: its {part} part has no rows")
        if len({len(row.texts) for row in rows}) > 1:
            raise RequestError(f"{name}: some rows have one text and some two")
    return found


def part_of(text: str) -> str:
    """Where a text belongs, by its hash: 80% train, 10% validation, 10% test."""
    place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
    return PARTS[0 if place < 80 else 1 if place < 90 else 2]


def _boolq() -> TextSet:
    try:
        path, source = located(_BOOLQ_FILE), _BOOLQ_FILE
        rows: Iterable[Mapping[str, Any]] = _json_lines(str(path))
    except RequestError:
        rows, source = (
            [*_dataset("google/boolq", None, "train"), *_dataset("google/boolq", None, "validation")],
            ("google/boolq, both parts"),
        )
    found = TextSet(["no", "yes"], source)
    for row in rows:
        question, passage = row["question"], row["passage"]
        found.parts[part_of(passage)].append(LabelledText((question, passage), int(row["answer"])))
    return found


def _glue(task: str) -> TextSet:
    if task not in GLUE:
        raise RequestError(f"unknown GLUE task {task!r}{suggest(task, GLUE)}; known: {', '.join(GLUE)}")
    fields, test = GLUE[task]
    train = _dataset("nyu-mll/glue", task, "train")
    found = TextSet(list(train.features["label"].names), f"nyu-mll/glue, {task}")
    for part, rows in (("train", train), ("test", _dataset("nyu-mll/glue", task, test))):
        for row in rows:
            texts = tuple(row[name] for name in fields)
            place = part
            if part == "train" and part_of("\n".join(texts)) == "validation":
                place = "validation"
            found.parts[place].append(LabelledText(texts, int(row["label"])))
    return found


def _from_file(name: str) -> TextSet:
    rows = list(_json_lines(str(located(name))))
    for number, row in enumerate(rows, 1):
        if "label" not in row or not isinstance(row.get("text"), str):
            raise RequestError(
                f"{name}, line {number}: it needs `text` and `label`, and has {', '.join(row)}"
            )
    classes = sorted({str(row["label"]) for row in rows})
    found = TextSet(classes, name)
    for row in rows:
        texts = tuple(row[key] for key in ("text", "text2") if key in row)
        found.parts[part_of(texts[-1])].append(LabelledText(texts, classes.index(str(row["label"]))))
    return found


def _json_lines(path: str) -> Iterable[dict[str, Any]]:
    opener: Any = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error


def _dataset(name: str, configuration: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} needs datasets: pip install 'shoestring[train]' (or a folder in SHOESTRING_DATA that holds it)"
        ) from error
    return load_dataset(name, configuration, split=split)

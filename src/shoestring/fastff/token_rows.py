"""A corpus as rows of token ids in a memory-mapped file, prepared once: documents end to end, [SEP] behind each.

Held-out documents are chosen by a hash of their text, so the same ones for every tokenizer and every arm.
"""

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from shoestring.errors import RequestError

__all__ = ["PreparedCorpus", "is_held_out", "pack_documents", "prepare_corpus", "rows_of"]

_PARAGRAPHS = 10_000  # encoded at a time
_PARTS = 1_000_000


@dataclass(frozen=True)
class PreparedCorpus:
    """Rows [N, length] of both parts, and what is known of them."""

    folder: Path
    train: np.ndarray
    held_out: np.ndarray
    about: dict[str, Any]


def is_held_out(document: Sequence[str], share: float) -> bool:
    """Whether a document belongs to the held-out part."""
    return zlib.crc32("\n".join(document).encode()) % _PARTS < share * _PARTS


def pack_documents(documents: Iterable[Sequence[str]], tokenizer: Any, end: int) -> Iterator[np.ndarray]:
    """Chunks of the token stream of all documents, `end` behind each."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True  # a text that has [SEP] in it does not end there

    def encoded(paragraphs: list[str | None]) -> np.ndarray:
        found = iter(backend.encode_batch([p for p in paragraphs if p is not None], add_special_tokens=False))
        ids = [[end] if p is None else next(found).ids for p in paragraphs]
        return np.fromiter((token for part in ids for token in part), np.int32)

    waiting: list[str | None] = []
    for document in documents:
        waiting += [*document, None]
        if len(waiting) >= _PARAGRAPHS:
            yield encoded(waiting)
            waiting = []
    if waiting:
        yield encoded(waiting)


def rows_of(documents: Iterable[Sequence[str]], tokenizer: Any, end: int, length: int) -> np.ndarray:
    """Rows [N, length] in memory, for texts that fit there; what is left at the end is dropped.

    Raises:
        RequestError: not even one row.
    """
    chunks = list(pack_documents(documents, tokenizer, end))
    stream = np.concatenate(chunks) if chunks else np.empty(0, np.int32)
    count = len(stream) // length
    if not count:
        raise RequestError(f"the text has {len(stream)} tokens; one row of {length} is the least")
    return stream[: count * length].reshape(count, length)


def prepare_corpus(
    folder: Path, documents: Iterable[Sequence[str]], tokenizer: Any, *, length: int, held_out: float
) -> PreparedCorpus:
    """Write both parts into `folder` (whole or not at all) and map them; if it is there already, only map them.

    Raises:
        RequestError: a part has not even one row.
    """
    if not (folder / "about.json").is_file():
        part = folder.with_name(f"{folder.name}.part")
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        about = _write(part, documents, tokenizer, length, held_out)
        tokenizer.save_pretrained(part / "tokenizer")
        (part / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    about = json.loads((folder / "about.json").read_text())
    kind = np.dtype(about["dtype"])
    parts = {}
    for name in ("train", "held_out"):
        shape = (about[f"{name}_rows"], length)
        parts[name] = np.memmap(folder / f"{name}.bin", kind, "r", shape=shape)
    return PreparedCorpus(folder, parts["train"], parts["held_out"], about)


def _write(
    folder: Path, documents: Iterable[Sequence[str]], tokenizer: Any, length: int, share: float
) -> dict[str, Any]:
    kind = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)
    names = ("train", "held_out")
    counts = {"documents": 0, "characters": 0, "held_out_documents": 0, "held_out_characters": 0}
    waiting: dict[str, list[Sequence[str]]] = {name: [] for name in names}
    tokens = dict.fromkeys(names, 0)
    files = {name: (folder / f"{name}.bin").open("wb") for name in names}

    def flush(name: str) -> None:
        for chunk in pack_documents(waiting[name], tokenizer, tokenizer.sep_token_id):
            files[name].write(chunk.astype(kind).tobytes())
            tokens[name] += len(chunk)
        waiting[name] = []

    try:
        for document in documents:
            name = names[is_held_out(document, share)]
            prefix = "held_out_" if name == "held_out" else ""
            counts[f"{prefix}documents"] += 1
            counts[f"{prefix}characters"] += sum(map(len, document)) + len(document)
            waiting[name].append(document)
            if len(waiting[name]) >= 500:
                flush(name)
        for name in names:
            flush(name)
    finally:
        for file in files.values():
            file.close()
    for name in names:
        if tokens[name] < length:
            raise RequestError(
                f"the {name.replace('_', '-')} part has {tokens[name]} tokens; one row of {length} is the least "
                "(more text, or another data.held_out)"
            )
    rows = {f"{name}_rows": tokens[name] // length for name in names}
    return {"dtype": kind.name, "length": length, **counts, **rows}

"""Text that GPTQ sees: windows of tokens from places evenly spread over it."""

import gzip
import lzma
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from shoestring.errors import RequestError

__all__ = ["calibration_windows", "read_calibration_text", "tokens_of"]

_CHUNK = 1_000_000
_ROOM = 8
"""Characters that surely hold a token, on average."""


def read_calibration_text(path: Path) -> str:
    """A text file, also compressed (.gz, .xz).

    Raises:
        RequestError: it is not there or no text.
    """
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            text: str = file.read()
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"calibration text {path} cannot be read: {reason}") from error
    return text


def tokens_of(tokenizer: Any, text: str) -> Int[Tensor, " T"]:
    """Token ids of a long text, as of one document, without special ones."""
    chunks = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
    encodings = tokenizer.backend_tokenizer.encode_batch(chunks, add_special_tokens=False)
    return torch.cat([torch.tensor(encoding.ids, dtype=torch.long) for encoding in encodings])


def calibration_windows(tokenizer: Any, text: str, count: int, length: int = 512) -> Int[Tensor, "B T"]:
    """At most `count` windows of `length` tokens, evenly spread over a text; fewer where it is short.

    Raises:
        RequestError: the text has not even one, or no count was asked for.
    """
    if count < 1 or length < 1:
        raise RequestError(f"{count} calibration windows of {length} tokens: at least one of one is needed")
    room = _ROOM * length
    if len(text) <= count * room:  # a short text is cut where its tokens are
        tokens = tokens_of(tokenizer, text) if text else torch.empty(0, dtype=torch.long)
        found = list(tokens.split(length))
    else:
        starts = [round(index * (len(text) - room) / max(1, count - 1)) for index in range(count)]
        found = [tokens_of(tokenizer, text[at : at + room])[:length] for at in starts]
    whole = [window for window in found if len(window) == length][:count]
    if not whole:
        raise RequestError(f"the calibration text is shorter than one window of {length} tokens")
    return torch.stack(whole)

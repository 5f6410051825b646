"""One family of errors: each message names the offending value and the remedy."""

import difflib
from collections.abc import Iterable

__all__ = [
    "DownloadError",
    "MissingDependencyError",
    "ModelFileError",
    "RequestError",
    "ShoestringError",
    "TrainingError",
    "UnsupportedModelError",
    "first_line",
    "suggest",
]


class ShoestringError(Exception):
    """The work failed. The command line exits with `exit_code`."""

    exit_code = 1


class RequestError(ShoestringError, ValueError):
    """The request itself was wrong: an unknown name, an impossible value."""

    exit_code = 2


class ModelFileError(ShoestringError):
    """A model's file is missing, broken, or of a kind that is never read (pickles)."""


class UnsupportedModelError(ShoestringError):
    """The engine cannot be right on this model, so it refuses it by name."""


class DownloadError(ShoestringError):
    """A model could not be fetched, or what arrived is not what was pinned."""


class TrainingError(ShoestringError):
    """A training run cannot go on (a loss that is not a number); its last good checkpoint is kept."""


class MissingDependencyError(ShoestringError, ImportError):
    """An optional part is not installed; the message is the command that installs it."""


def first_line(error: BaseException) -> str:
    """Another library's error on one line: its message's first, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggest(value: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest of `known`, or an empty string."""
    nearest = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""

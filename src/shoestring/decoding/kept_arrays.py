"""Arrays that were measured or written once per model and machine, kept as files in the cache."""

from contextlib import suppress
from pathlib import Path

import numpy as np

__all__ = ["keep_array", "kept_array"]


def kept_array(path: Path) -> np.ndarray | None:
    """The array in the file; None where there is no file, or no array in it."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if isinstance(array, np.ndarray) else None


def keep_array(path: Path, array: np.ndarray) -> None:
    """Write the array, whole or not at all; a read-only cache only costs making it again next time."""
    part = path.with_suffix(".part.npy")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(part, array)
        part.replace(path)

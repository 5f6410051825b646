"""The cache on disk: where it lies, locks between processes, whole-folder writes, remembered hashes."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shoestring.errors import RequestError, ShoestringError

__all__ = [
    "Progress",
    "alone",
    "cache_root",
    "file_sha256",
    "folder_bytes",
    "locked",
    "remembered_sha256",
    "require_space",
    "subfolder",
    "whole_folder",
    "write_json",
]

Progress = Callable[[str, int, int | None], None]
"""Called as `(stage, done, total)`, in bytes where the stage has bytes."""

_CHUNK = 1 << 20
_STALE_SECONDS = 24 * 3600


def cache_root() -> Path:
    """`$SHOESTRING_CACHE`, else `$XDG_CACHE_HOME/shoestring`, else `~/.cache/shoestring`."""
    if own := os.environ.get("SHOESTRING_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "shoestring"


def subfolder(name: str) -> Path:
    """The cache's folder `name`, made if it is missing."""
    path = cache_root() / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"cache folder {path} cannot be made ({reason}): set SHOESTRING_CACHE") from error
    return path


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise if fewer than `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ShoestringError(
            f"{purpose} needs {needed} bytes in {folder}, and {free} are free: "
            "free some, or set SHOESTRING_CACHE to a larger disk"
        )


@contextlib.contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the lock `key` among all processes that share this cache (nothing where flock is missing)."""
    if not _has_flock():
        yield
        return
    import fcntl

    with open(subfolder("locks") / f"{key}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a sibling folder to write into; it becomes `target` in one rename, or nothing remains.

    Call it under the lock of `target`: leftovers of killed writers are removed first.
    """
    prefix = f".{target.name}.part-"
    for leftover in target.parent.glob(prefix + "*"):
        if _has_flock() or time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield part
        part.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def alone(path: Path, within: Path) -> Iterator[Path]:
    """A link to `path`, alone in a private folder below `within`: nothing beside the user's file can take part."""
    private = within / ".source"
    private.mkdir()
    try:
        link = private / f"model{path.suffix}"
        try:
            link.symlink_to(path.resolve())
        except OSError:
            os.link(path.resolve(), link)
        yield link
    finally:
        shutil.rmtree(private, ignore_errors=True)


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of a whole file, in hexadecimal."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress("hash", done, total)
    return digest.hexdigest()


def remembered_sha256(path: Path, progress: Progress | None = None) -> str:
    """`file_sha256`, kept beside the file's path, size and time so that an unchanged file is read once."""
    path = path.resolve()
    stat = path.stat()
    known = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = subfolder("hashes") / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(noted, dict) and all(noted.get(key) == value for key, value in known.items()):
            return str(noted["sha256"])
    digest = file_sha256(path, progress)
    write_json(note, {**known, "sha256": digest})
    return digest


def write_json(path: Path, content: object) -> None:
    """Write `path` in one rename, so that no reader sees half of it."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def folder_bytes(path: Path) -> int:
    """The bytes of the files below `path` (or of the file itself), links not followed."""
    if not path.is_dir():
        return path.lstat().st_size if path.exists() else 0
    return sum(entry.lstat().st_size for entry in path.rglob("*") if entry.is_file() or entry.is_symlink())


def _has_flock() -> bool:
    return importlib.util.find_spec("fcntl") is not None

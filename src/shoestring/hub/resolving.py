"""A model's name, whatever its kind, -> the local folder that holds it."""

import re
from pathlib import Path

from shoestring.errors import ModelFileError, RequestError, suggest
from shoestring.hub.cache import Progress, remembered_sha256
from shoestring.hub.catalogue import BUNDLED
from shoestring.hub.download import fetch_bundled
from shoestring.hub.gguf_conversion import convert_gguf
from shoestring.hub.gguf_header import read_gguf_header
from shoestring.hub.snapshots import fetch_adapter, fetch_model, verify_adapter
from shoestring.hub.verify import verify_folder

__all__ = ["DTYPES", "check_dtype", "find_gguf", "resolve", "resolve_adapter"]

DTYPES = ("auto", "float32", "bfloat16", "float16")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def check_dtype(dtype: str) -> str:
    """Return `dtype` if it is one of `DTYPES`, else raise RequestError."""
    if dtype not in DTYPES:
        raise RequestError(
            f"unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)}: one of {', '.join(DTYPES)}"
        )
    return dtype


def resolve(
    name: str | Path, *, revision: str | None = None, dtype: str = "auto", progress: Progress | None = None
) -> Path:
    """The verified local folder (safetensors, config, tokenizer) of a model.

    `name` is a bundled name, a folder, a `.gguf` file or a hub id "org/name". A GGUF is converted once into
    the cache, as bfloat16 unless `dtype` names another. A hub model that is whole on this machine is used
    without network.

    Raises:
        RequestError: the name means nothing here.
        DownloadError: it could not be fetched.
        ModelFileError: it is broken, or holds only pickles.
    """
    check_dtype(dtype)
    text = str(name)
    if text in BUNDLED:
        _refuse_revision(text, revision)
        model = BUNDLED[text]
        return convert_gguf(text, model.gguf_sha256, dtype, lambda: fetch_bundled(model, progress), progress)
    path = Path(text).expanduser()
    if path.is_dir():
        _refuse_revision(text, revision)
        return verify_folder(path)
    if path.is_file():
        _refuse_revision(text, revision)
        return _resolve_file(path, dtype, progress)
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return fetch_model(name, revision, progress)
    raise _unknown(text, path)


def find_gguf(name: str | Path, progress: Progress | None = None) -> Path | None:
    """The GGUF file of a bundled name (fetched where it is missing) or of a path; None for all other names."""
    text = str(name)
    if text in BUNDLED:
        return fetch_bundled(BUNDLED[text], progress)
    path = Path(text).expanduser()
    return path if path.is_file() and _is_gguf(path) else None


def resolve_adapter(name: str | Path, progress: Progress | None = None) -> Path:
    """The verified local folder of a PEFT adapter: a folder or a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return verify_adapter(path)
    if isinstance(name, str) and _HUB_ID.fullmatch(name):
        return fetch_adapter(name, progress=progress)
    raise RequestError(f"adapter {str(name)!r} is neither a folder nor a hub id of the form 'org/name'")


def _resolve_file(path: Path, dtype: str, progress: Progress | None) -> Path:
    if not _is_gguf(path) and path.suffix != ".gguf":
        raise RequestError(f"{path} is not a GGUF file: name a .gguf file or the folder that holds the model")
    read_gguf_header(path)  # a broken file is refused before its bytes are hashed
    return convert_gguf(path.stem, remembered_sha256(path, progress), dtype, lambda: path, progress)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise RequestError(f"revision {revision!r} means nothing for {name!r}: only hub ids have revisions")


def _unknown(text: str, path: Path) -> RequestError:
    from shoestring.hub.inventory import list_models

    if path.suffix in (".gguf", ".safetensors") or text.startswith((".", "/", "~")) or text.count("/") > 1:
        return RequestError(f"there is no file or folder {text!r}")
    known = [model.name for model in list_models()]
    return RequestError(
        f"unknown model {text!r}{suggest(text, known)}: name one of {', '.join(BUNDLED)}, "
        "a folder, a .gguf file or a hub id 'org/name'"
    )

"""What is known and what lies on this machine, and removing it again."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.errors import RequestError, suggest
from shoestring.hub.cache import cache_root, folder_bytes, locked
from shoestring.hub.catalogue import BUNDLED
from shoestring.hub.gguf_conversion import MANIFEST

__all__ = ["ModelInfo", "list_models", "remove_model"]


@dataclass(frozen=True)
class ModelInfo:
    """A model that is known by name or lies on this machine."""

    name: str
    kind: str
    """`bundled`, `converted` (from a .gguf file), `packed` (for the CPU's native step) or `hub`."""
    local: bool
    size_bytes: int
    """Bytes on disk; for a bundled model that is not local, bytes to fetch."""
    path: Path | None


def list_models() -> list[ModelInfo]:
    """Bundled models, converted GGUF files, packed weights and the hub models of this machine."""
    models = []
    for name, bundled in BUNDLED.items():
        parts = _bundled_parts(name)
        folders = [part for part in parts if part.is_dir()]
        size = sum(map(folder_bytes, parts)) or bundled.size_bytes
        models.append(ModelInfo(name, "bundled", bool(parts), size, next(iter(folders or parts), None)))
    own = {part for name in BUNDLED for part in _bundled_parts(name)}
    models += [
        ModelInfo(folder.name, "converted", True, folder_bytes(folder), folder)
        for folder in _made("converted")
        if folder not in own
    ]
    models += [
        ModelInfo(folder.name, "packed", True, folder_bytes(folder), folder) for folder in _made("packed")
    ]
    models += [
        ModelInfo(repo.repo_id, "hub", True, repo.size_on_disk, Path(repo.repo_path))
        for repo in sorted(_hub_models(), key=lambda repo: str(repo.repo_id))
    ]
    return models


def remove_model(name: str) -> int:
    """Delete what the cache holds of a listed model; return the bytes freed.

    Raises:
        RequestError: `name` is not in the cache (a folder or file of the user's own is never deleted).
    """
    if name in BUNDLED:
        return sum(_delete(part) for part in _bundled_parts(name))
    for folder in [*_made("converted"), *_made("packed")]:
        if folder.name == name:
            return _delete(folder)
    for repo in _hub_models():
        if repo.repo_id == name:
            return _delete_hub(repo)
    known = [model.name for model in list_models() if model.local]
    if Path(name).expanduser().exists():
        raise RequestError(f"{name!r} is your own file or folder, not the cache's: it is left alone")
    raise RequestError(f"no model {name!r} is in the cache{suggest(name, known)}")


def _bundled_parts(name: str) -> list[Path]:
    """The conversions of a bundled model, of any dtype and converter version, and its fetched GGUF."""
    model = BUNDLED[name]
    prefix = f"{name}-{model.gguf_sha256[:16]}-"
    parts = [folder for folder in _made("converted") if folder.name.startswith(prefix)]
    gguf = cache_root() / "bundled" / model.gguf_name
    return [*parts, gguf] if gguf.is_file() else parts


def _made(kind: str) -> Iterator[Path]:
    """The cache's whole folders of a kind."""
    folder = cache_root() / kind
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and not path.is_symlink() and (path / MANIFEST).is_file():
                yield path


def _delete(path: Path) -> int:
    if path.parent.parent != cache_root():
        raise AssertionError(f"{path} is outside the cache")
    with locked(path.name):
        size = folder_bytes(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return size


def _hub_models() -> list[Any]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []


def _delete_hub(repo: Any) -> int:
    from huggingface_hub import scan_cache_dir

    plan = scan_cache_dir().delete_revisions(*[revision.commit_hash for revision in repo.revisions])
    plan.execute()
    return int(plan.expected_freed_size)

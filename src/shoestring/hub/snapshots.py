"""Hub ids: a repository's safetensors, config and tokenizer as a local folder; nothing else is fetched."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from shoestring.errors import DownloadError, ModelFileError, RequestError, first_line
from shoestring.hub.cache import Progress, subfolder, write_json
from shoestring.hub.verify import PICKLE_REASON, read_json, verify_folder, verify_safetensors

__all__ = ["fetch_adapter", "fetch_model", "verify_adapter"]

_WANTED = ("*.safetensors", "*.json", "tokenizer*.model", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.gguf", "*.py")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fetch_model(repo: str, revision: str | None, progress: Progress | None = None) -> Path:
    """The verified local snapshot of a model repository; one that is whole here is used without network."""
    note = _note(repo, revision)
    with contextlib.suppress(OSError, ValueError, KeyError, ModelFileError):
        return verify_folder(Path(json.loads(note.read_text(encoding="utf-8"))["folder"]))
    folder = _snapshot(repo, revision, progress)
    try:
        verify_folder(folder)
    except ModelFileError as error:
        raise _explain_contents(repo, revision, error) from error
    write_json(note, {"repo": repo, "revision": revision, "folder": str(folder)})
    return folder


def fetch_adapter(repo: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The verified local snapshot of an adapter repository."""
    return verify_adapter(_snapshot(repo, revision, progress))


def verify_adapter(folder: Path) -> Path:
    """Return `folder` if it holds a PEFT adapter in safetensors."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelFileError(f"{folder} has no adapter_config.json, so it is not a PEFT adapter")
    read_json(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        if any((folder / f"adapter_model{suffix}").is_file() for suffix in _PICKLE_SUFFIXES):
            raise ModelFileError(f"{folder} holds only a pickled adapter: {PICKLE_REASON}")
        raise ModelFileError(f"{folder} has no adapter_model.safetensors")
    verify_safetensors(weights)
    return folder


def _note(repo: str, revision: str | None) -> Path:
    """Where it is noted that a snapshot was fetched whole (a folder of one cut short looks alike)."""
    key = hashlib.sha256(f"{repo}@{revision or ''}".encode()).hexdigest()[:32]
    return subfolder("snapshots") / f"{key}.json"


def _snapshot(repo: str, revision: str | None, progress: Progress | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    wanted: dict[str, Any] = {"allow_patterns": list(_WANTED), "ignore_patterns": list(_UNWANTED)}
    if progress:
        wanted["tqdm_class"] = _bar(progress)
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, **wanted))
    except errors.HFValidationError as error:
        raise RequestError(f"{repo!r} is not a hub id of the form 'org/name'") from error
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: accept its terms on its hub page, then log in with 'hf auth login'"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"the hub knows no model {repo!r}: check its spelling, or, if it is private, "
            "log in with 'hf auth login'"
        ) from error
    except Exception as error:
        with contextlib.suppress(Exception):
            wanted.pop("tqdm_class", None)
            return Path(
                huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True, **wanted)
            )
        if isinstance(error, errors.OfflineModeIsEnabled) or huggingface_hub.constants.HF_HUB_OFFLINE:
            raise DownloadError(f"{repo}{at} is not on this machine, and HF_HUB_OFFLINE is set") from error
        reason = first_line(error)
        raise DownloadError(
            f"{repo}{at} is not on this machine and the hub cannot be reached: {reason}"
        ) from error


def _explain_contents(repo: str, revision: str | None, error: ModelFileError) -> ModelFileError:
    """Say what the repository holds instead of safetensors, if the hub can still be asked."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    except Exception:
        return error
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return error
    if any(name.endswith(".gguf") for name in names):
        return ModelFileError(f"{repo} holds only GGUF files: download one and name the file itself")
    if any(name.endswith(_PICKLE_SUFFIXES) for name in names):
        return ModelFileError(f"{repo} holds only pickled weights: {PICKLE_REASON}")
    return error


def _bar(progress: Progress) -> type[Any]:
    """A tqdm class that draws nothing and passes byte counts on."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._unit, self._done, self._of = (
                kwargs.get("unit"),
                kwargs.get("initial") or 0,
                kwargs.get("total"),
            )
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += n or 0
            if self._unit == "B":
                progress("download", int(self._done), int(self.total or self._of or 0) or None)
            return None

    return Bar

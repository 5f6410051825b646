"""A run's folder: `config.yaml`, `metrics.jsonl`, checkpoints, plots, and `result.json` once it is finished.

A checkpoint counts only with its `complete` marker, written last; so a run may be killed at any moment.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shoestring.errors import RequestError
from shoestring.training.recipe import Recipe

__all__ = ["RunFolder"]

_MARKER = "complete"


class RunFolder:
    """The folder of one run. Under a launcher only the process of rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = int(os.environ.get("RANK", "0")) == 0

    @classmethod
    def open(cls, path: Path, recipe: Recipe, *, resume: bool = False) -> "RunFolder":
        """Begin a run here, or with `resume` go on with the one that is here (begin it where there is none).

        A run that came to no checkpoint, its own or one of a run inside it, is begun anew.

        Raises:
            RequestError: the folder holds a run and `resume` is not asked for, or a run of another recipe, or is full of
                something else.
        """
        folder = cls(path)
        if not folder.writes:
            return folder
        config = recipe.model_dump(mode="json")
        if folder._config_file.is_file() and not any(path.rglob(f"checkpoint-*/{_MARKER}")):
            shutil.rmtree(path)
        if folder._config_file.is_file():
            if not resume:
                raise RequestError(
                    f"{path} already holds a run; --resume goes on with it, --output names another folder"
                )
            folder._compare(config)
            folder._clear_half_written()
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RequestError(f"{path} is not empty and holds no run; name another folder with --output")
        else:
            path.mkdir(parents=True, exist_ok=True)
            part = folder._config_file.with_suffix(".part")
            part.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
            part.replace(folder._config_file)
        return folder

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoint-*") if (path / _MARKER).is_file()]
        return sorted(found, key=_step_of)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        return next(reversed(self.checkpoints()), None)

    def complete(self, checkpoint: Path, keep: int) -> None:
        """Mark a checkpoint as whole, and remove all but the newest `keep`."""
        if not self.writes:
            return
        (checkpoint / _MARKER).touch()
        for old in self.checkpoints()[:-keep]:
            (old / _MARKER).unlink()
            shutil.rmtree(old)

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.writes:
            with self._metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, of one kind or all; a half-written last line is left out."""
        if not self._metrics_file.is_file():
            return []
        rows = []
        for line in self._metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if kind is None or row["kind"] == kind:
                rows.append(row)
        return rows

    def rewind(self, step: int) -> None:
        """Forget the metrics after `step`: a resumed run records them again."""
        if self.writes:
            rows = [row for row in self.metrics() if row["step"] <= step]
            part = self._metrics_file.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            part.replace(self._metrics_file)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`: the run is over."""
        if self.writes:
            part = self._result_file.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(self._result_file)

    def result(self) -> dict[str, Any] | None:
        """What a finished run came to; None while it is not finished."""
        if not self._result_file.is_file():
            return None
        found: dict[str, Any] = json.loads(self._result_file.read_text(encoding="utf-8"))
        return found

    def training_seconds(self) -> float:
        """Time spent training, over all the times the run was resumed."""
        total = before = 0.0
        for row in self.metrics("train"):
            total += row["seconds"] - (before if row["seconds"] > before else 0.0)
            before = row["seconds"]
        return round(total, 1)

    @property
    def _config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def _metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _result_file(self) -> Path:
        return self.path / "result.json"

    def _compare(self, config: Mapping[str, Any]) -> None:
        try:
            saved = yaml.safe_load(self._config_file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise RequestError(f"{self._config_file} cannot be read: {error}") from error
        old, new = _flat(saved), _flat(config)
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if keys:
            changes = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in keys)
            raise RequestError(
                f"{self.path} holds a run of another recipe ({changes}); name another folder with --output"
            )

    def _clear_half_written(self) -> None:
        for path in self.path.glob("checkpoint-*"):
            if not (path / _MARKER).is_file():
                shutil.rmtree(path)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import write_llama

from shoestring.cli import run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model whose tokenizer has a chat template."""
    return str(write_llama(tmp_path_factory.mktemp("models") / "tiny", chat=True))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def shoestring(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command: `(exit code, stdout, stderr)`; with `code=0` and `--json`, the object printed."""

    def call(*arguments: str, fails: int | None = None) -> Any:
        code = run(arguments)
        out, err = capfd.readouterr()
        assert code == (fails or 0), err
        if fails is not None:
            lines = [line for line in err.splitlines() if line.startswith("shoestring: ")]
            assert len(lines) == 1, err
            assert "Traceback" not in err
            return lines[0]
        return json.loads(out) if "--json" in arguments else out

    return call


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write a JSON Lines file of these rows (text as it stands)."""

    def write(*rows: Any, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import write_gguf, write_llama

import shoestring.hub as hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    root = tmp_path / "cache"
    monkeypatch.setenv("SHOESTRING_CACHE", str(root))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return root


@pytest.fixture(scope="session")
def default_folder() -> Path:
    return hub.resolve("smollm2-135m")


@pytest.fixture
def make_gguf() -> Callable[..., Path]:
    return write_gguf


@pytest.fixture
def make_llama() -> Callable[..., Path]:
    return write_llama


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = write_llama(tmp_path / "sharded", shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture
def edit_json() -> Callable[..., None]:
    def edit(path: Path, change: Callable[[Any], Any]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit

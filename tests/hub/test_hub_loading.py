import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import shoestring.hub as hub
from shoestring.errors import (
    DownloadError,
    MissingDependencyError,
    ModelFileError,
    RequestError,
    UnsupportedModelError,
)

Make = Callable[..., Path]


@pytest.mark.parametrize("kind", ["llama", "sharded"])
def test_folder_loads(request: pytest.FixtureRequest, kind: str) -> None:
    folder: Path = request.getfixturevalue(kind)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loaded = hub.load_pretrained(str(folder), dtype="float32")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert loaded.folder == folder
    assert loaded.name == str(folder)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer("héllo").input_ids) == "héllo"


def test_loading_prints_nothing(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.load_pretrained(llama)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_may_be_absent_but_not_broken(tmp_path: Path, llama: Path, make_llama: Make) -> None:
    assert hub.load_pretrained(make_llama(tmp_path / "bare", tokenizer=False)).tokenizer is None
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"the tokenizer in .*llama could not be loaded") as caught:
        hub.load_pretrained(llama)
    assert "\n" not in str(caught.value)


def test_dtypes(llama: Path) -> None:
    assert hub.load_pretrained(llama, dtype="float16").model.dtype == torch.float16
    assert hub.load_pretrained(llama).model.dtype in (torch.bfloat16, torch.float32)
    with pytest.raises(RequestError, match=r"'bfloat1' \(did you mean 'bfloat16'\?\)"):
        hub.load_pretrained(llama, dtype="bfloat1")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_unknown_device(llama: Path, device: str) -> None:
    with pytest.raises(RequestError, match=device):
        hub.load_pretrained(llama, device=device)


def test_missing_tensor_is_not_filled_with_noise(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        hub.load_pretrained(llama)


def test_tensor_of_another_shape(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match="could not be loaded"):
        hub.load_pretrained(llama)


@pytest.mark.parametrize("model_type", ["quux", "vit"])
def test_not_a_known_language_model(llama: Path, edit_json: Callable[..., None], model_type: str) -> None:
    edit_json(llama / "config.json", lambda config: config.update(model_type=model_type, architectures=[]))
    with pytest.raises(UnsupportedModelError, match=model_type):
        hub.load_pretrained(llama)


def test_code_in_a_folder_is_not_run(llama: Path, edit_json: Callable[..., None]) -> None:
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(llama / "config.json", lambda config: config.update(model_type="quux", auto_map=auto))
    with pytest.raises(UnsupportedModelError):
        hub.load_pretrained(llama)


@pytest.fixture
def adapter(tmp_path: Path, llama: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = hub.load_pretrained(llama, dtype="float32").model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by a name of yesterday
        get_peft_model(base, settings).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_adapter_is_merged(llama: Path, adapter: Path) -> None:
    plain = hub.load_pretrained(llama, dtype="float32").model
    merged = hub.load_pretrained(llama, dtype="float32", adapter=adapter).model
    assert type(merged) is type(plain)
    name = "model.layers.0.self_attn.q_proj"
    saved = load_file(adapter / "adapter_model.safetensors")
    down, up = (saved[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    before, after = (model.state_dict()[f"{name}.weight"] for model in (plain, merged))
    torch.testing.assert_close(after - before, 4.0 * up @ down)
    assert not any(parameter.numel() == 0 for parameter in merged.parameters())


def test_broken_adapters(tmp_path: Path, llama: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="neither a folder nor a hub id"):
        hub.load_pretrained(llama, adapter="nowhere")
    with pytest.raises(ModelFileError, match=r"adapter_config\.json"):
        hub.load_pretrained(llama, adapter=llama)
    weights = adapter / "adapter_model.safetensors"
    saved = load_file(weights)
    save_file({key: value for key, value in saved.items() if "layers.0" in key}, weights)
    with pytest.raises(ModelFileError, match="lacks tensors"):
        hub.load_pretrained(llama, adapter=adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelFileError, match="pickles can run code"):
        hub.load_pretrained(llama, adapter=adapter)
    save_file(saved, weights)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'shoestring\[train\]'"):
        hub.load_pretrained(llama, adapter=adapter)


def test_unknown_names(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"did you mean 'smollm2-135m'\?"):
        hub.resolve("smollm-135m")
    with pytest.raises(RequestError, match="no file or folder"):
        hub.resolve("./absent")
    with pytest.raises(RequestError, match="no file or folder"):
        hub.resolve("absent.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RequestError, match="not a GGUF file"):
        hub.resolve(tmp_path / "notes.txt")


def test_revision_means_nothing_for_a_folder(llama: Path) -> None:
    for name in (str(llama), "smollm2-135m"):
        with pytest.raises(RequestError, match="only hub ids have revisions"):
            hub.resolve(name, revision="main")


def test_hub_id_passes_the_revision_on_and_then_needs_no_network(
    cache: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.resolve("some/model", revision="v1") == llama
    assert calls[0][0] == "some/model"
    assert calls[0][1]["revision"] == "v1"
    assert not any("bin" in pattern or "pt" in pattern for pattern in calls[0][1]["allow_patterns"])
    assert hub.resolve("some/model", revision="v1") == llama
    assert len(calls) == 1
    hub.resolve("some/model")
    assert len(calls) == 2


def _hub_error(kind: type[Exception]) -> Exception:
    return kind.__new__(kind, "long\nstory")  # some ask for a whole HTTP answer in __init__


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "the hub knows no model 'some/model'"),
        (errors.GatedRepoError, "gated: .* log in"),
        (errors.RevisionNotFoundError, "has no revision 'v1'"),
        (ConnectionError, "hub cannot be reached: long"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    ],
)
def test_hub_errors_are_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str
) -> None:
    def snapshot(repo: str, **options: Any) -> str:
        raise _hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(DownloadError, match=words) as caught:
        hub.resolve("some/model", revision="v1")
    assert "\n" not in str(caught.value)


def test_lost_connection_falls_back_on_the_local_snapshot(
    cache: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(repo: str, *, local_files_only: bool = False, **options: Any) -> str:
        if not local_files_only:
            raise ConnectionError("no route")
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.resolve("some/model", progress=lambda *report: None) == llama


@pytest.mark.parametrize(("file", "words"), [("pytorch_model.bin", "pickles"), ("q4.gguf", "only GGUF")])
def test_repository_without_safetensors(
    cache: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, file: str, words: str
) -> None:
    (llama / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(llama))
    files = ["config.json", file]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, **options: files)
    with pytest.raises(ModelFileError, match=words):
        hub.resolve("some/model")


def test_list_and_remove(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    assert [(model.name, model.local) for model in hub.list_models()] == [("smollm2-135m", False)]
    assert hub.remove_model("smollm2-135m") == 0
    source = make_gguf(tmp_path / "tiny.gguf")
    folder = hub.resolve(source)
    info = hub.list_models()[-1]
    assert (info.name, info.kind, info.local, info.path) == (folder.name, "converted", True, folder)
    assert hub.remove_model(folder.name) == info.size_bytes > 0
    assert not folder.exists()
    assert source.exists()


def test_remove_leaves_what_is_not_the_caches(cache: Path, llama: Path) -> None:
    for name in (str(llama), "../llama", "../../llama"):
        with pytest.raises(RequestError):
            hub.remove_model(name)
    assert hub.verify_folder(llama)


def test_hub_models_are_listed_and_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "hub"
    commit = "a" * 40
    snapshot = store / "models--some--model" / "snapshots" / commit
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    blob = snapshot.parents[1] / "blobs" / "b"
    blob.write_bytes(bytes(1000))
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(store))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(store), raising=False)
    info = hub.list_models()[-1]
    assert (info.name, info.kind, info.size_bytes) == ("some/model", "hub", 1000)
    with pytest.raises(RequestError, match=r"did you mean 'some/model'\?"):
        hub.remove_model("some/modle")
    assert hub.remove_model("some/model") == 1000
    assert not snapshot.exists()

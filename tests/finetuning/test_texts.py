import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest
import yaml

from shoestring.errors import MissingDependencyError, RequestError
from shoestring.finetuning.pass_recipe import PassRecipe
from shoestring.finetuning.texts import Source, read_texts
from shoestring.training.recipe import read_recipe, validated

ROOT = Path(__file__).parent.parent.parent
ROWS = [{"text": "one"}, {"text": " "}, {"text": "two", "question": "why?"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def test_paragraphs_and_rows_packed_or_not(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text(JSONL)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(JSONL)
    with lzma.open(tmp_path / "a.txt.xz", "wt") as file:
        file.write("one\n\ntwo")
    assert read_texts(Source(path=str(tmp_path / "a.txt"))) == ["one\nline", "two"]
    assert read_texts(Source(path=str(tmp_path / "a.txt.xz"))) == ["one", "two"]
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read_texts(Source(path=str(tmp_path / name))) == ["one", "two"]
        assert read_texts(Source(path=str(tmp_path / name), most=1)) == ["one"]


def test_a_field_or_the_first_user_turn(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert read_texts(Source(path=str(path))) == ["hello"]
    path.write_text(JSONL)
    with pytest.raises(RequestError, match=r"a\.jsonl, line 1: no text in 'question'"):
        read_texts(Source(path=str(path), field="question"))


def test_names_lead_into_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_DATA", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.jsonl").write_text(JSONL)
    assert read_texts(Source(path="prompts/a.jsonl")) == ["one", "two"]
    with pytest.raises(
        RequestError, match=r"no file 'prompts/b\.jsonl', neither here nor in SHOESTRING_DATA"
    ):
        read_texts(Source(path="prompts/b.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: no text"),
        ("a.txt", b"\n\n", "holds no texts"),
        ("a.txt", b"\xff\xfe\x80", "cannot be read"),
        ("a.txt.xz", b"plain", "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_texts(Source(path=str(tmp_path / name)))


def test_hub_sets_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"shoestring\[train\]"):
        read_texts(Source(path="hf:some/set:train"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("pass-*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid_and_name_their_command(path):
    first = path.read_text().splitlines()[0]
    assert first == f"# shoestring train recipes/{path.name}"
    recipe = validated(PassRecipe, read_recipe(path))
    assert yaml.safe_load(path.read_text())["task"] == "pass"
    own = [source.path for source in recipe.data.prompts if source.path.startswith("recipes/")]
    assert all((ROOT / name).is_file() for name in own)
    evaluated = ("mt_bench", "humaneval", "gsm8k_test")
    assert not [s.path for s in recipe.data.prompts for name in evaluated if name in s.path]

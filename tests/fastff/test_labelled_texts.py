"""Labelled sets: no passage in two parts, GLUE by its id, intervals and scores."""

import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest

from shoestring.errors import MissingDependencyError, RequestError
from shoestring.evaluation.accuracy import accuracy_of, wilson_interval
from shoestring.fastff.classification import matthews
from shoestring.fastff.classification_data import PARTS, read_text_set
from shoestring.fastff.text_source import read_documents

DATA = Path(os.environ.get("SHOESTRING_DATA", "/nowhere"))


class Rows(list):
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, rows, names=()):
        super().__init__(rows)
        self.features = {"label": types.SimpleNamespace(names=list(names))}


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` of which every set has the same rows."""
    asked = []

    def load_dataset(name, configuration=None, split=None, streaming=False):
        asked.append((name, configuration, split))
        many = 200 if split == "train" else 9
        if name == "nyu-mll/glue":
            rows = [{"sentence1": f"a {n}", "sentence2": f"{split} {n}", "label": n % 2} for n in range(many)]
            return Rows(rows, ["entailment", "not_entailment"])
        if name == "google/boolq":
            return Rows({"question": "is it", "passage": f"p {n}", "answer": n % 3 == 0} for n in range(many))
        return Rows({"text": f"line {n}\n\nnext"} for n in range(3))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.skipif(
    not (DATA / "qa" / "boolq.jsonl.gz").is_file(), reason="no qa/boolq.jsonl.gz in SHOESTRING_DATA"
)
def test_boolq_parts_share_no_passage():
    found = read_text_set("boolq")
    sizes = {part: len(found.parts[part]) for part in PARTS}
    assert sum(sizes.values()) == 6349
    assert sizes["train"] > 4800
    assert min(sizes["validation"], sizes["test"]) > 500
    passages = [{row.texts[1] for row in found.parts[part]} for part in PARTS]
    assert not passages[0] & passages[1]
    assert not passages[0] & passages[2]
    assert not passages[1] & passages[2]
    labels = [row.label for part in PARTS for row in found.parts[part]]
    assert sum(labels) / len(labels) == pytest.approx(0.6157, abs=1e-4)


def test_boolq_without_the_file_is_the_public_one(hub, monkeypatch):
    monkeypatch.setenv("SHOESTRING_DATA", "/nowhere")
    found = read_text_set("boolq")
    assert found.source == "google/boolq, both parts"
    assert [split for _, _, split in hub] == ["train", "validation"]
    assert sum(map(len, found.parts.values())) == 209


def test_glue_validates_on_its_training_part(hub):
    found = read_text_set("glue/rte")
    assert found.classes == ["entailment", "not_entailment"]
    assert len(found.parts["test"]) == 9
    assert len(found.parts["train"]) + len(found.parts["validation"]) == 200
    assert 5 < len(found.parts["validation"]) < 40
    assert all(row.texts[1].startswith("train") for row in found.parts["validation"])
    assert hub == [("nyu-mll/glue", "rte", "train"), ("nyu-mll/glue", "rte", "validation")]


def test_hub_texts_are_documents(hub):
    assert list(read_documents(["hf:a/b/c/train"])) == [
        ["line 0", "next"],
        ["line 1", "next"],
        ["line 2", "next"],
    ]
    assert hub == [("a/b", "c", "train")]


def test_without_datasets_the_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        read_text_set("glue/rte")
    with pytest.raises(MissingDependencyError, match="pip install"):
        list(read_documents(["hf:a/b/c/train"]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "line 1: it needs `text` and `label`"),
        ([{"text": "a", "label": 1}] * 3, "its validation part has no rows|its train part has no rows"),
    ],
)
def test_files_that_are_no_set(tmp_path, rows, message):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(RequestError, match=message):
        read_text_set(str(path))


@pytest.mark.parametrize("right", [0, 1, 300, 599, 600])
def test_wilsons_interval_is_the_score_tests(right):
    """Its ends are the shares that a two-sided test at 5% just allows."""
    low, high = wilson_interval(right, 600)
    assert low <= right / 600 <= high
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / 600 - end) / (end * (1 - end) / 600) ** 0.5 == pytest.approx(
                1.959964, abs=1e-5
            )
    with pytest.raises(RequestError):
        wilson_interval(2, 1)


def test_scores():
    found = accuracy_of([1, 1, 0, 1], [1, 0, 0, 1])
    assert (found.accuracy, found.right, found.majority_rate) == (0.75, 3, 0.5)
    assert matthews([1, 1, 0, 1], [1, 0, 0, 1]) == pytest.approx(1 / 3**0.5)
    assert matthews([1, 1], [1, 1]) == 0.0
    assert matthews([2, 1], [1, 1]) is None
    with pytest.raises(RequestError):
        accuracy_of([1], [1, 0])

"""Pre-training, fine-tuning, evaluation and conversion through the real commands, at sizes that take seconds."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from benchmarks import ultrafastbert_quality
from benchmarks.training_tables import arm_rows
from safetensors.torch import load_file

from shoestring.cli import run
from shoestring.fastff.bert_recipe import BertRecipe
from shoestring.fastff.classification_recipe import ClassificationRecipe
from shoestring.fastff.conversion_training import ConversionRecipe
from shoestring.fastff.convert import load_converted
from shoestring.training.recipe import read_recipe, validated

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SMALL = (
    "data.vocabulary=120", "data.length=16", "data.held_out=0.1", "model.hidden_size=32", "model.layers=2",
    "model.heads=2", "batch_size=16", "steps=60", "warmup_steps=6", "learning_rate=0.01", "save_every=15", "log_every=15",
    "evaluate_every=30", "device=cpu", "compile=false",
)  # fmt: skip
CLASSIFY = ("seeds=2", "steps=40", "warmup_steps=4", "save_every=10", "evaluate_every=20", "learning_rate=0.003",
            "max_tokens=32", "device=cpu")  # fmt: skip
ANIMALS, PLANTS = ["cat", "dog", "horse", "goat"], ["oak", "fern", "moss", "rose"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text in which what follows is decided by what came before, and rows to classify."""
    path, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    lines, rows = [], []
    for number in range(1500):
        kind = draw.randrange(2)
        name = draw.choice((ANIMALS, PLANTS)[kind])
        lines.append(f"the {name} {('runs', 'grows')[kind]} in field {draw.choice('abcdefgh')}")
        rows.append(
            {"text": "is it an animal", "text2": f"{lines[-1]} {number}", "label": ("yes", "no")[kind]}
        )
    (path / "text.txt").write_text("\n\n".join(lines))
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:400]))
    return path


def command(folder, output, *overrides, recipe="ultrafastbert-small"):
    return ["train", str(RECIPES / f"{recipe}.yaml"), *overrides, "--output", str(output)]


def pretrain(folder, name, feedforward):
    path = folder / name
    text = f"data.train=['{folder / 'text.txt'}']"
    assert run(command(folder, path, text, *SMALL, f"model.feedforward={feedforward}")) == 0
    return path


@pytest.fixture(scope="module")
def fff(folder):
    return pretrain(folder, "fff", "fff-2x3")


@pytest.fixture(scope="module")
def dense(folder):
    return pretrain(folder, "dense", "dense-30")


@pytest.fixture(scope="module")
def classifier(folder, fff):
    path = folder / "classifier"
    overrides = (f"model={fff}", f"data={folder / 'rows.jsonl'}", *CLASSIFY)
    assert run(command(folder, path, *overrides, recipe="boolq")) == 0
    return path


def result_of(path):
    return json.loads((path / "result.json").read_text())


def test_pretraining_learns_and_says_what_it_did(fff, folder):
    result = result_of(fff)
    assert result["held_out"]["perplexity"] < 20  # 120 pieces, evenly: 120
    low, high = result["held_out"]["interval"]
    assert low < result["held_out"]["loss"] < high
    assert (result["neurons"], result["active_neurons"]) == (30, 8)
    assert len(result["routing"]) == 2
    for layer in result["routing"]:
        assert 0 <= layer["dead_leaves"] < 1
        assert 1 / 8 <= layer["busiest_leaf"] <= 1
        assert layer["evenness"][0] == 1
        assert layer["tokens"] == 16 * result["held_out"]["rows"]
    assert result["tokens"] == 60 * 16 * 16
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (fff / "final").iterdir()
    }


def test_arms_share_their_rows(fff, dense, folder):
    assert len(list(folder.glob("prepared-*"))) == 1
    assert result_of(fff)["data"] == result_of(dense)["data"]
    assert result_of(dense)["routing"] == []


def test_killed_pretraining_resumes_to_the_same_model(folder, fff, tmp_path):
    path = tmp_path / "run"
    words = command(
        folder, path, f"data.train=['{folder / 'text.txt'}']", *SMALL, "model.feedforward=fff-2x3"
    )
    process = subprocess.Popen([sys.executable, "-m", "shoestring", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not list(path.glob("checkpoint-*/complete"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (path / "result.json").exists(), "the run was over before it was killed"
    assert run([*words, "--resume"]) == 0
    ours, theirs = (load_file(of / "final" / "model.safetensors") for of in (path, fff))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert result_of(path)["held_out"] == result_of(fff)["held_out"]


def test_masked_lm_is_evaluated_on_any_text(fff, folder, capfd):
    words = [
        "evaluate",
        "masked-lm",
        str(fff),
        "--text",
        str(folder / "text.txt"),
        "--length",
        "16",
        "--json",
    ]
    assert run(words) == 0
    found = json.loads(capfd.readouterr().out)
    assert 1 < found["perplexity"] < 20
    assert found["masked_tokens"] == found["rows"] * 4


def test_classifier_is_fine_tuned_over_seeds(classifier):
    result = result_of(classifier)
    assert [seed["seed"] for seed in result["seeds"]] == [0, 1]
    for seed in result["seeds"]:
        test = seed["test"]
        assert test["interval"][0] <= test["accuracy"] <= test["interval"][1]
        assert test["accuracy"] > test["majority_rate"] + 0.2
    weights = [load_file(p) for p in sorted(classifier.glob("seed-*/checkpoint-40/model.safetensors"))]
    assert not torch.equal(weights[0]["classifier.weight"], weights[1]["classifier.weight"])


def test_interrupted_fine_tuning_goes_on_with_its_seeds(classifier, folder, fff, tmp_path):
    """The second seed is what is missing; the first is not trained again, and the end is the same."""
    path = tmp_path / "again"
    overrides = (f"model={fff}", f"data={folder / 'rows.jsonl'}", *CLASSIFY)
    words = command(folder, path, *overrides, recipe="boolq")
    assert run(words) == 0
    (path / "result.json").unlink()
    for checkpoint in (path / "seed-1").glob("checkpoint-*"):
        (checkpoint / "complete").unlink()
    stamp = (path / "seed-0" / "config.yaml").stat().st_mtime_ns
    assert run([*words, "--resume"]) == 0
    assert (path / "seed-0" / "config.yaml").stat().st_mtime_ns == stamp
    same = [[seed["test"] for seed in result_of(of)["seeds"]] for of in (path, classifier)]
    assert same[0] == same[1]


def test_benchmark_compares_arms(fff, dense, classifier, monkeypatch, capsys, tmp_path):
    output, balanced = tmp_path / "result.json", tmp_path / "balanced"
    shutil.copytree(fff, balanced)  # as though it had been trained with it
    recipe = yaml.safe_load((balanced / "config.yaml").read_text())
    (balanced / "config.yaml").write_text(yaml.safe_dump({**recipe, "balance": 0.1}))
    words = [
        str(dense),
        str(fff),
        str(balanced),
        "--classifiers",
        str(classifier),
        "--device",
        "cpu",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["ultrafastbert_quality", *words])
    ultrafastbert_quality.main()
    result = json.loads(output.read_text())
    first, second, _ = result["arms"]
    assert first["feedforward"] == "dense-30"
    assert second["boolq"]["interval"][0] < second["boolq"]["mean"] <= 1
    paired, _ = result["paired"]
    expected = second["held_out"]["loss"] - first["held_out"]["loss"]
    assert paired["loss_difference"] == pytest.approx(expected, abs=1e-6)
    assert paired["interval"][0] <= expected <= paired["interval"][1]
    assert "fff-2x3 balance 0.1" in capsys.readouterr().out
    rows = arm_rows(result)
    assert [row[0] for row in rows] == ["dense-30", "fff-2x3", "fff-2x3 balance 0.1"]
    dead = [layer["dead_nodes"] for layer in second["routing"]]
    assert rows[1][4].startswith(f"{expected:+.3f} ")
    assert [row[5] for row in rows] == ["", f"{sum(dead) / 2:.0%}", f"{sum(dead) / 2:.0%}"]


def test_conversion_through_its_recipe(dense, folder):
    path = folder / "converted"
    overrides = (
        f"model={dense}", "layers=[1]", "feedforward=fff-1x4", f"data.train=['{folder / 'text.txt'}']", "data.rows=200",
        "data.length=16", "data.held_out=0.1", "data.held_out_rows=20", "steps=150", "warmup_steps=5",
        "learning_rate=0.01", "batch_size=32", "device=cpu", "evaluate_every=75", "save_every=75", "speed_tokens=2",
        "together_steps=40",
    )  # fmt: skip
    assert run(command(folder, path, *overrides, recipe="fff-smollm2")) == 0
    result = result_of(path)
    assert result["layers"] == [1]
    assert result["layer_errors"][0] < 0.6
    assert result["before"]["loss"] < result["after"]["loss"] < result["left_out"]["loss"]
    assert result["after_together"]["loss"] < result["after"]["loss"] + 0.01
    assert set(result["speed"]) == {"before", "after"}
    model = load_converted(path / "final")
    assert model.encoder.layers[1].feedforward.w_in.shape == (1, 31, 32)
    assert model.num_parameters() == result["converted_parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "masked-lm", "nowhere"], "needs --text"),
        (["evaluate", "boolqq", "x"], "did you mean 'boolq'"),
        (["train", "{small}", "model.feedforward=ffff"], "write fff-1x11"),
        (["train", "{small}", "data.length=9000"], "data.length is 9000"),
        (["train", "{small}", "balance=0.1", "method=masked"], "method 'masked' has no such term"),
        (["train", "{small}", "balance=-1"], "balance"),
        (["train", "{boolq}", "data=glue/rtee"], "did you mean 'rte'"),
        (["train", "{boolq}", "data=none.jsonl"], "is not there"),
    ],
)
def test_what_is_wrong_is_one_line(words, message, capfd, tmp_path):
    recipes = {"{small}": RECIPES / "ultrafastbert-small.yaml", "{boolq}": RECIPES / "boolq.yaml"}
    asked = [str(recipes.get(word, word)) for word in words]
    if words[0] == "train":
        asked += ["--output", str(tmp_path / "run")]
    assert run(asked) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("shoestring: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("ultrafastbert-small", BertRecipe),
        ("ultrafastbert-paper", BertRecipe),
        ("boolq", ClassificationRecipe),
        ("fff-smollm2", ConversionRecipe),
    ],
)
def test_recipes_are_valid_and_begin_with_their_command(name, schema):
    path = RECIPES / f"{name}.yaml"
    validated(schema, read_recipe(path))
    assert path.read_text().splitlines()[0] == f"# shoestring train recipes/{name}.yaml"
    assert len(schema.model_fields) <= 25

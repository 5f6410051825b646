"""`train`, `translate`, `parse` and `evaluate`, on models that learn in seconds."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shoestring.cli import run

RECIPES = Path(__file__).parent.parent.parent / "recipes"
QUICK = (
    "data.train=['generated:reverse[0:300]']", "data.validation=generated:reverse[300:310]",
    "data.test={reverse: 'generated:reverse[310:320]'}", "model.layers=1", "model.d_model=16", "model.heads=2",
    "batch_tokens=512", "steps=30", "save_every=5", "log_every=5", "evaluate_every=15", "device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The reverse recipe as it stands: the model, and its result."""
    path = tmp_path_factory.mktemp("runs") / "reverse"
    assert run(["train", str(RECIPES / "reverse.yaml"), "--output", str(path)]) == 0
    return str(path), json.loads((path / "result.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "quick"
    assert run(["train", str(RECIPES / "reverse.yaml"), *QUICK, "--output", str(path)]) == 0
    return path


@pytest.mark.slow
def test_reversing_is_learnt(trained):
    scores = trained[1]["scores"]["reverse"]
    assert scores["averaged, beam"]["exact"] >= 99.5
    assert scores["averaged, greedy"]["exact"] >= 99.5
    assert trained[1]["training_seconds"] < 300


@pytest.mark.slow
def test_translate(shoestring, trained, tmp_path):
    assert shoestring("translate", trained[0], "a b c d e") == "e d c b a\n"
    result = shoestring("translate", trained[0], "q w e r", "--beam", "1", "--json")
    assert result["translations"] == ["r e w q"]
    assert result["tokens_per_second"] > 0
    source, target = tmp_path / "in.txt", tmp_path / "deep" / "out.txt"
    source.write_text("a b c\n\nz y x w\n")
    shoestring("translate", trained[0], "--input", str(source), "--output", str(target))
    assert target.read_text() == "c b a\n\nw x y z\n"


@pytest.mark.slow
def test_attention_is_drawn_with_its_tokens(shoestring, trained, tmp_path):
    for name in ("heads.png", "heads.html"):
        shoestring("translate", trained[0], "a b c d", "--attention", str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 2000
    page = (tmp_path / "heads.html").read_text()
    assert page.count("<table>") == 3 * 2 * 4  # kinds, layers, heads
    assert "<th>c" in page


@pytest.mark.slow
def test_evaluate_translation_and_compare(shoestring, trained, quick, tmp_path):
    pairs = [("a b c d e f", "f e d c b a"), ("x y z w v", "v w z y x"), ("k l m n", "n m l k")]
    (tmp_path / "source").write_text("".join(f"{s}\n" for s, _ in pairs))
    (tmp_path / "target").write_text("".join(f"{t}\n" for _, t in pairs))
    files = ("--source", str(tmp_path / "source"), "--reference", str(tmp_path / "target"))
    result = shoestring("evaluate", "translation", trained[0], *files, "--against", str(quick), "--json")
    assert result["bleu"] == pytest.approx(100)
    assert "tok:13a" in result["signatures"]["bleu"]
    assert result["against"]["difference"] > 50
    assert "bleu: 100.00" in shoestring("evaluate", "translation", trained[0], *files)
    (tmp_path / "target").write_text("one line\n")
    assert "3 lines" in shoestring("evaluate", "translation", trained[0], *files, fails=2)


def test_parse_and_evaluate_parsing(shoestring, quick, tmp_path):
    """Whatever a barely trained model writes is a tree over the words."""
    tree = shoestring("parse", str(quick), "the old dog saw a river .", "--beam", "2", "--extra-length", "10")
    assert [word.rstrip(")") for word in tree.split() if not word.startswith("(")] == [
        "the",
        "old",
        "dog",
        "saw",
        "a",
        "river",
        ".",
    ]
    gold = tmp_path / "gold"
    gold.write_text("(S (NP (DT the) (NN dog)) (VP (VBD sang)))\n")
    result = shoestring("evaluate", "parsing", str(quick), "--reference", str(gold), "--beam", "2", "--json")
    assert result["trees"] == 1
    assert 0 <= result["f1"] <= 100


def test_run_folder_holds_everything(quick):
    assert {"config.yaml", "metrics.jsonl", "result.json", "final", "plots", "tokenizer"} <= {
        p.name for p in quick.iterdir()
    }
    result = json.loads((quick / "result.json").read_text())
    assert set(result["scores"]["reverse"]) == {
        "last, greedy",
        "last, beam",
        "averaged, greedy",
        "averaged, beam",
    }
    assert result["averaged"] == ["checkpoint-25", "checkpoint-30"]
    assert not list(quick.rglob("*.bin"))


def test_killed_run_resumes_to_the_same_model(shoestring, quick, tmp_path):
    path = tmp_path / "run"
    command = ["train", str(RECIPES / "reverse.yaml"), *QUICK, "--output", str(path)]
    process = subprocess.Popen([sys.executable, "-m", "shoestring", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not list(path.glob("checkpoint-*/complete"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "--resume goes on" in shoestring(*command, fails=2)
    shoestring(*command, "--resume")
    ours, theirs = (load_file(of / "final" / "model.safetensors") for of in (path, quick))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert shoestring(*command, "--resume", "--json")["averaged"] == ["checkpoint-25", "checkpoint-30"]
    assert "steps was 30 and is 31" in shoestring(*command, "steps=31", "--resume", fails=2)


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (("stepz=3",), 2, "did you mean 'steps'"),
        (("task=transfromer",), 2, "did you mean 'transformer'"),
        (("data.train=['nowhere.{}']",), 2, "is not there"),
        (("device=tpu",), 2, "device 'tpu' is not there"),
        (("data.vocabulary=20",), 2, "at least 259"),
        (("batch_tokens=8",), 2, "raise batch_tokens"),
        (("learning_rate=1e30", "log_every=1", "schedule=constant", "warmup_steps=0"), 1, "not a finite number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(shoestring, tmp_path, overrides, code, words):
    output = str(tmp_path / "run")
    line = shoestring(
        "train", str(RECIPES / "reverse.yaml"), *QUICK, *overrides, "--output", output, fails=code
    )
    assert words in line


def test_corpus_smaller_than_a_batch_trains(shoestring, tmp_path):
    (tmp_path / "t.en").write_text("a b c\n")
    (tmp_path / "t.de").write_text("c b a\n")
    corpus = (
        "data.languages=[en, de]",
        f"data.train=['{tmp_path}/t.{{}}']",
        "data.validation=null",
        "data.test={}",
        "steps=3",
    )
    result = shoestring(
        "train", str(RECIPES / "reverse.yaml"), *QUICK, *corpus, "--output", str(tmp_path / "run"), "--json"
    )
    assert result["pairs"] == 1


def test_translate_says_what_is_wrong(shoestring, quick, tmp_path):
    assert "config.json" in shoestring("translate", str(tmp_path), "x", fails=1)
    assert "positions" in shoestring("translate", str(quick), "a " * 300, fails=2)
    assert "is empty" in shoestring("translate", str(quick), " ", fails=2)
    assert "--output belongs to --input" in shoestring("translate", str(quick), "x", "--output", "y", fails=2)
    assert "unknown dtype" in shoestring("translate", str(quick), "x", "--dtype", "int3", fails=2)
    assert "known: translation, parsing" in shoestring("evaluate", "translations", str(quick), fails=2)
    assert shoestring("translate", str(quick), "猫 🐈", "--beam", "1").endswith("\n")


def test_vocabulary_of_another_run_is_refused(shoestring, quick, tmp_path):
    import shutil

    from shoestring.transformer.tokenizer import train_tokenizer

    shutil.copytree(quick / "final", tmp_path / "mixed")
    train_tokenizer(["other words"], 270).save_pretrained(tmp_path / "mixed")
    assert "not of the same run" in shoestring("translate", str(tmp_path / "mixed"), "x", fails=1)

"""README and docs: their commands and programs run, their tables are those of the result files."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from shoestring.cli import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(language):
    for page in PAGES:
        for kind, content in BLOCK.findall(page.read_text()):
            if kind == language:
                yield pytest.param(content, id=f"{page.stem}-{content.strip().splitlines()[0][:40]}")


def commands():
    for block in blocks("bash"):
        for line in block.values[0].splitlines():
            if words := shlex.split(line, comments=True):
                yield words


# What makes a recipe of any length a matter of a second: the page's command is run with these values.
QUICK = (
    "data.train=['generated:reverse[0:60]']", "data.validation=null", "data.test={toy: 'generated:reverse[60:64]'}",
    "model.layers=1", "model.d_model=16", "model.heads=2", "model.max_positions=512", "data.vocabulary=300",
    "metric=exact", "steps=4", "save_every=2", "average=2", "batch_tokens=512", "device=cpu", "precision=fp32",
    "compile=false",
)  # fmt: skip


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The folder of a Transformer's run that took a second."""
    path = tmp_path_factory.mktemp("pages") / "run"
    assert run(["train", str(ROOT / "recipes" / "reverse.yaml"), *QUICK, "--output", str(path)]) == 0
    return path


SHOESTRING = [words[1:] for words in commands() if words[0] == "shoestring"]


@pytest.mark.parametrize("words", SHOESTRING, ids=" ".join)
def test_shown_command_runs(words, tmp_path, monkeypatch, capfd, request):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    if words[0] in ("generate", "compare"):
        words = [*words, "--max-new-tokens", "8"]
    if words[0] == "train":
        words = [*words, *QUICK]
    if words[0] in ("translate", "parse", "evaluate"):
        folder = next(word for word in words if word.startswith("runs/"))
        shutil.copytree(request.getfixturevalue("quick_run"), tmp_path / folder)
    assert run(words) == 0, capfd.readouterr().err
    assert capfd.readouterr().out or words[0] == "chat" or "--output" in words


def test_shown_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for words in commands() if words[0] == "make" for word in words[1:] if "=" not in word}
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is not in the Makefile"


@pytest.mark.parametrize("program", list(blocks("python")))
def test_shown_program_runs(program, smollm2, capsys):
    import torch

    import shoestring

    names = {}
    if "import shoestring" not in program:  # a fragment: it goes on from what the page has set up
        inputs = torch.tensor([smollm2.encode("Once upon a time")])
        names = {"shoestring": shoestring, "model": smollm2}
        if "**inputs" in program:
            names = {
                "shoestring": shoestring,
                "model": smollm2.model,
                "inputs": {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)},
            }
    exec(compile(program, "page", "exec"), names)
    assert capsys.readouterr().out or "custom_generate" in program


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_tables_are_those_of_the_result_files():
    from benchmarks.tables import pages, rewritten

    stale = [path.name for path in pages() if rewritten(path) != path.read_text()]
    assert not stale, f"make results rewrites {stale}"

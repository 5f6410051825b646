import datetime
import json
import re

import torch

from shoestring.evaluation.results import machine_name, provenance, write_result


def test_a_result_is_written_whole_with_where_it_came_from(tmp_path):
    path = tmp_path / "results" / "speed.cpu.json"
    write_result(path, {"zeta": 1, "alpha": [2.5]})
    written = json.loads(path.read_text())
    assert list(written)[-2:] == ["zeta", "alpha"]
    assert {name: written[name] for name in ("zeta", "alpha")} == {"zeta": 1, "alpha": [2.5]}
    assert set(provenance()) <= set(written)
    assert list(path.parent.iterdir()) == [path], "nothing unfinished may be left"
    write_result(path, {"zeta": 2})
    assert "alpha" not in json.loads(path.read_text())


def test_provenance_says_when_where_and_with_what(monkeypatch):
    monkeypatch.setattr("sys.argv", ["speed.py", "--output", "x.json"])
    facts = provenance()
    assert (
        abs((datetime.date.fromisoformat(facts["date"]) - datetime.datetime.now(datetime.UTC).date()).days)
        <= 1
    )
    assert set(facts["versions"]) == {"python", "shoestring", "torch", "transformers"}
    assert facts["command"].startswith("python ")
    assert facts["command"].endswith("--output x.json")
    assert facts["commit"]


def test_outside_a_repository_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance()["commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["commit"] == "unknown"


def test_a_machines_name_is_fit_for_a_file_name():
    name = machine_name()
    assert re.fullmatch(r"cpu-\d+threads-[a-z0-9_]+", name)
    assert f"-{torch.get_num_threads()}threads-" in name

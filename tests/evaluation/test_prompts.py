import json

import pytest

from shoestring.errors import RequestError
from shoestring.evaluation.prompts import data_folder, load_prompts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "prompts").mkdir()
    monkeypatch.setenv("SHOESTRING_DATA", str(tmp_path))
    return tmp_path


def write(folder, name, rows):
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "prompts" / name).write_text(text + "\n\n", encoding="utf-8")


def test_each_set_gives_its_user_turns(folder):
    write(folder, "mt_bench.jsonl", [{"turns": ["Erste Frage?", "second"]}])
    write(folder, "gsm8k_test.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    write(folder, "humaneval.jsonl", [{"prompt": "def f():\n    '''é'''\n\n"}])
    assert load_prompts("mt_bench") == ["Erste Frage?"]
    assert load_prompts("gsm8k") == ["1 + 1?"]
    assert load_prompts("humaneval") == [
        "Complete this Python function:\n\n```python\ndef f():\n    '''é'''\n```"
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(None, range(10)), (10, range(10)), (99, range(10)), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (1, [0])],
)
def test_fewer_prompts_are_spread_over_the_set(folder, count, expected):
    write(folder, "gsm8k_test.jsonl", [{"question": str(index)} for index in range(10)])
    assert load_prompts("gsm8k", count) == [str(index) for index in expected]


def test_an_unknown_set_is_refused_with_the_nearest(folder):
    with pytest.raises(
        RequestError, match=r"'mtbench' \(did you mean 'mt_bench'\?\); known: mt_bench, gsm8k"
    ):
        load_prompts("mtbench")


def test_what_is_missing_is_named(folder, monkeypatch):
    with pytest.raises(RequestError, match=r"gsm8k_test.jsonl is not there; SHOESTRING_DATA must name"):
        load_prompts("gsm8k")
    for value in ("", str(folder / "nowhere")):
        monkeypatch.setenv("SHOESTRING_DATA", value)
        with pytest.raises(RequestError, match="SHOESTRING_DATA is "):
            data_folder()
    monkeypatch.delenv("SHOESTRING_DATA")
    with pytest.raises(RequestError, match="SHOESTRING_DATA is ''"):
        data_folder()

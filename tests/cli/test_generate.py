import io
import json
from pathlib import Path

import pytest
import torch

import shoestring as package
from shoestring.cli import run

SHORT = ("--max-new-tokens", "12", "--dtype", "float32")


def test_json_is_what_the_library_gives(shoestring, tiny):
    result = shoestring(
        "generate", "hello", "--model", tiny, *SHORT, "--json", "--seed", "3", "--temperature", "0.9"
    )
    model = package.load(tiny, dtype="float32")
    messages = [{"role": "user", "content": "hello"}]
    expected = model.generate(messages, max_new_tokens=12, seed=3, temperature=0.9)
    assert result["token_ids"] == expected.token_ids
    assert result["text"] == expected.text
    assert set(result) >= {
        "prompt_tokens", "steps", "tokens_per_step", "seconds", "tokens_per_second", "decoding", "finish_reason",
    }  # fmt: skip


def test_raw_leaves_the_chat_template_out(shoestring, tiny):
    chat = shoestring("generate", "hello", "--model", tiny, *SHORT, "--json")
    raw = shoestring("generate", "hello", "--model", tiny, *SHORT, "--json", "--raw")
    assert raw["prompt_tokens"] == len("hello")
    assert chat["prompt_tokens"] > raw["prompt_tokens"]


@pytest.mark.parametrize(
    "decoding", ["autoregressive", "lookahead(window=4,ngram=3,guesses=4)", "ngram", "auto"]
)
def test_streamed_text_is_the_json_text(shoestring, tiny, decoding):
    arguments = ("generate", "hello", "--model", tiny, *SHORT, "--decoding", decoding)
    assert shoestring(*arguments) == shoestring(*arguments, "--json")["text"] + "\n"


def test_prompt_from_standard_input(shoestring, tiny, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    piped = shoestring("generate", "-", "--model", tiny, *SHORT, "--json")
    assert (
        piped["token_ids"] == shoestring("generate", "hello", "--model", tiny, *SHORT, "--json")["token_ids"]
    )


def test_file_results_keep_order_and_ids(shoestring, tiny, write_lines, tmp_path):
    rows = [{"prompt": "x" * (1 + 7 * n % 11), "id": n} for n in range(11)]
    rows[4] = {"messages": [{"role": "user", "content": "hi"}], "id": 4}
    target = tmp_path / "deep" / "answers.jsonl"
    arguments = (
        "generate",
        "--input",
        str(write_lines(*rows)),
        "--output",
        str(target),
        "--model",
        tiny,
        *SHORT,
    )
    summary = shoestring(*arguments, "--json")
    assert (summary["results"], summary["kept"]) == (11, 0)
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [result["id"] for result in results] == list(range(11))
    assert [result["line"] for result in results] == list(range(1, 12))
    single = shoestring("generate", "hi", "--model", tiny, *SHORT, "--json")
    assert results[4]["token_ids"] == single["token_ids"]


def test_interrupted_file_goes_on_where_it_stopped(shoestring, tiny, write_lines, tmp_path):
    source = write_lines(*({"prompt": f"prompt {n}"} for n in range(5)))
    target = tmp_path / "answers.jsonl"
    arguments = ("generate", "--input", str(source), "--output", str(target), "--model", tiny, *SHORT)
    shoestring(*arguments)
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:2]) + lines[2][:30])  # killed in the middle of a line
    assert shoestring(*arguments, "--json")["kept"] == 2
    again = [json.loads(line)["token_ids"] for line in target.read_bytes().splitlines()]
    assert again == [json.loads(line)["token_ids"] for line in lines]
    before = target.read_bytes()
    assert shoestring(*arguments, "--json")["kept"] == 5
    assert target.read_bytes() == before


def test_output_of_other_settings_is_not_mixed(shoestring, tiny, write_lines, tmp_path):
    source, target = write_lines({"prompt": "a"}), tmp_path / "answers.jsonl"
    arguments = ("generate", "--input", str(source), "--output", str(target), "--model", tiny, *SHORT)
    shoestring(*arguments)
    before = target.read_bytes()
    assert "answers.jsonl, line 1: not a result of these" in shoestring(*arguments, "--seed", "1", fails=2)
    assert target.read_bytes() == before


def test_file_without_output_goes_to_stdout(shoestring, tiny, write_lines):
    source = write_lines({"prompt": "a"}, {"prompt": "b"})
    out = shoestring("generate", "--input", str(source), "--model", tiny, *SHORT)
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "a"', "line 2: not JSON"),
        ('{"prompt": 3}', 'line 2: needs a "prompt"'),
        ('{"prompt": "  "}', 'line 2: needs a "prompt"'),
        ("[]", 'line 2: needs a "prompt"'),
        ('{"messages": [{"role": "user"}]}', "line 2: a message needs a role and content"),
        (json.dumps({"prompt": "a" * 500}), "line 2: the prompt has 5"),
    ],
)
def test_bad_line_is_named_before_anything_is_written(shoestring, tiny, write_lines, tmp_path, row, words):
    target = tmp_path / "answers.jsonl"
    source = write_lines({"prompt": "a"}, row)
    arguments = ("generate", "--input", str(source), "--output", str(target), "--model", tiny, *SHORT)
    assert words in shoestring(*arguments, fails=2)
    assert not target.exists()


def test_file_that_is_not_utf8_names_the_line(shoestring, tiny, tmp_path):
    source = tmp_path / "latin.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "latin.jsonl, line 2: not UTF-8" in shoestring(
        "generate", "--input", str(source), "--model", tiny, fails=2
    )


def test_missing_and_empty_files(shoestring, tiny, tmp_path):
    assert "No such file" in shoestring("generate", "--input", str(tmp_path / "absent"), fails=2)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "holds no prompts" in shoestring("generate", "--input", str(tmp_path / "empty.jsonl"), fails=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one prompt"),
        (("a", "--input", "b"), "give one prompt"),
        (("a", "--output", "b"), "--output belongs to --input"),
        (("",), "the prompt is empty"),
        (("  ",), "the prompt is empty"),
        (("a", "--temperature", "nan"), "temperature is nan"),
        (("a", "--temperature", "-1"), "temperature is -1.0"),
        (("a", "--top-p", "1.5"), "top_p is 1.5"),
        (("a", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("a", "--max-new-tokens", "-5"), "max_new_tokens is -5"),
        (("a", "--max-new-tokens", "many"), "--max-new-tokens"),
        (("a", "--stop", ""), "a stop string is empty"),
        (("a", "--decoding", "lokahead"), "did you mean 'lookahead'?"),
        (("a", "--decoding", "lookahead(windw=3)"), "did you mean 'window'?"),
        (("a", "--dtype", "float31"), "did you mean 'float32'?"),
        (("a", "--device", "gpu"), "unknown device 'gpu'"),
        (("a", "--device", "cuda:7"), "cuda:7"),
        (("a", "--seeed", "1"), "--seed"),
        (("a" * 600,), "the model's context 128"),
    ],
)  # fmt: skip
def test_wrong_request_is_one_line_and_exit_code_2(shoestring, tiny, arguments, words):
    assert words in shoestring("generate", *arguments, "--model", tiny, fails=2)


def test_unknown_model_suggests_the_nearest(shoestring):
    assert "did you mean 'smollm2-135m'?" in shoestring("generate", "a", "--model", "smolm2-135m", fails=2)


def test_broken_model_is_exit_code_1(shoestring, tiny, tmp_path):
    import shutil

    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"no")
    assert "model.safetensors is broken" in shoestring("generate", "a", "--model", str(broken), fails=1)


def test_debug_shows_the_traceback(tiny):
    with pytest.raises(package.ShoestringError):
        run(["--debug", "generate", "a", "--model", tiny, "--top-p", "7"])


def test_no_space_left_is_one_line(shoestring, tiny, write_lines):
    source = write_lines({"prompt": "a"})
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    arguments = ("generate", "--input", str(source), "--output", str(full), "--model", tiny, *SHORT)
    assert "no space left on the disk" in shoestring(*arguments, fails=1)


def test_look_ahead_embeddings_are_named_and_checked(shoestring, tiny, tmp_path):
    from safetensors.torch import save_file

    options = ("generate", "hello", "--model", tiny, "--raw", "-n", "2")
    line = shoestring(*options, "--decoding", "pass", fails=2)
    assert "shoestring train recipes/pass-smollm2.yaml" in line
    line = shoestring(*options, "--look-ahead", str(tmp_path / "none.safetensors"), fails=2)
    assert "no file of look-ahead embeddings" in line
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    line = shoestring(*options, "--look-ahead", str(tmp_path / "other.safetensors"), fails=1)
    assert "holds no look-ahead embeddings" in line

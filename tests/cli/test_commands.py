import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import shoestring as package
from shoestring.cli import run

COMMANDS = ["generate", "chat", "compare", "pull", "quantize", "models", "doctor"]
SHORT = ("--max-new-tokens", "10", "--dtype", "float32")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_json(shoestring, command):
    text = shoestring(command, "--help")
    assert f"Example: shoestring {command}" in text
    assert "--json" in text


def test_help_lists_every_command_and_comes_at_once():
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "shoestring", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - began < 2  # 0.3 s on a quiet machine
    assert all(command in done.stdout for command in COMMANDS)
    program = "import sys, shoestring.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version(shoestring):
    assert shoestring("--version") == f"shoestring {package.__version__}\n"


def test_unknown_command_suggests_the_nearest(shoestring):
    assert "generate" in shoestring("generat", fails=2)


def test_compare_says_equal_and_counts(shoestring, tiny, write_lines, tmp_path):
    trace = tmp_path / "trace.jsonl"
    source = write_lines({"prompt": "abcabcabcabc"}, {"prompt": "xyxyxyxy"})
    result = shoestring(
        "compare", "--prompts", str(source), "--model", tiny, *SHORT, "--json", "--trace", str(trace),
        "--decoding", "lookahead(window=4,ngram=3,guesses=4)", "--decoding", "ngram",
    )  # fmt: skip
    rows = {row["decoding"]: row for row in result["strategies"]}
    assert list(rows) == ["autoregressive", "lookahead(window=4,ngram=3,guesses=4)", "ngram"]
    assert all(row["verdict"] == "equal" and row["texts"] == 2 for row in rows.values())
    assert rows["autoregressive"]["tokens_per_step"] == 1
    assert rows["autoregressive"]["ratio"] == 1
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    window = [step["sources"]["window"]["drafted"] for step in steps if "window" in step["sources"]]
    # At most (W - 1) rows of level 0 and W of level 1; equal branches share rows.
    assert window
    assert max(window) <= 7
    assert {step["prompt"] for step in steps} == {0, 1}


def test_compare_in_batches(shoestring, tiny, write_lines):
    prompts = ["abcabcabcabc", "xyxyxyxy", "abab"]
    source = write_lines(*({"prompt": prompt} for prompt in prompts))
    arguments = ("compare", "--prompts", str(source), "--model", tiny, *SHORT, "--decoding", "ngram")
    alone, together = (shoestring(*arguments, "--json", "--batch", batch) for batch in ("1", "2"))
    assert (alone["batch"], together["batch"]) == (1, 2)
    for one, other in zip(alone["strategies"], together["strategies"], strict=True):
        assert other["verdict"] == "equal"
        assert other["texts"] == 3
        assert other["tokens_per_step"] == one["tokens_per_step"]  # each accepts its own
    out = shoestring(*arguments, "--batch", "2")
    assert [out.index(prompt) for prompt in prompts] == sorted(out.index(prompt) for prompt in prompts)
    assert "1 and 8" in shoestring(*arguments, "--batch", "0", fails=2)


def test_compare_prints_texts_and_a_table(shoestring, tiny):
    out = shoestring("compare", "abcabc", "--model", tiny, *SHORT, "--decoding", "ngram")
    model = package.load(tiny, dtype="float32")
    text = model.generate([{"role": "user", "content": "abcabc"}], max_new_tokens=10).text
    assert out.count(text) == 2
    assert "tokens/step" in out
    assert "the baseline" in out


def test_compare_needs_prompts(shoestring, tiny):
    assert "give prompts" in shoestring("compare", "--model", tiny, fails=2)
    assert "did you mean 'ngram'" in shoestring("compare", "a", "-d", "ngrm", "--model", tiny, fails=2)


def test_chat_reads_turns_and_keeps_the_conversation(shoestring, tiny, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    result = shoestring("chat", "--system", "Be brief.", "--model", tiny, *SHORT, "--json")
    assert [message["role"] for message in result["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    model = package.load(tiny, dtype="float32")
    second = model.generate(result["messages"][:-1], max_new_tokens=10)
    assert result["messages"][-1]["content"] == second.text
    assert [g["token_ids"] for g in result["generations"]][1] == second.token_ids


def test_chat_commands(shoestring, tiny, monkeypatch):
    answers = iter(["hello", "/what", "/clear", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    out = shoestring("chat", "--model", tiny, *SHORT)
    model = package.load(tiny, dtype="float32")
    assert out == model.generate([{"role": "user", "content": "hello"}], max_new_tokens=10).text + "\n"


def test_chat_without_a_template_says_what_to_do(shoestring, tmp_path):
    from folders import write_llama

    bare = write_llama(tmp_path / "bare")
    assert "has no chat template; shoestring generate --raw" in shoestring(
        "chat", "--model", str(bare), fails=2
    )


def test_quantize_writes_a_folder_that_generate_loads(shoestring, tiny, tmp_path):
    pytest.importorskip("shoestring._native", reason="built without the native part")
    text = tmp_path / "text.txt"
    text.write_text("A dog runs through the snow, and the cat sleeps. " * 80)
    plain, calibrated = (str(tmp_path / name) for name in ("plain", "calibrated"))
    out = shoestring("quantize", tiny, "--output", plain, "--quantize", "int8")
    assert out.startswith(f"{plain}: int8, to the nearest, ")
    told = shoestring(
        "quantize", tiny, "-o", calibrated, "--calibrate", str(text), "--windows", "2", "--json"
    )
    assert (told["folder"], told["quantize"], told["method"]) == (calibrated, "int4", "gptq")
    for folder in (plain, calibrated):
        assert shoestring("generate", "abc", "--model", folder, *SHORT, "--json")["token_ids"]
    assert "is there already" in shoestring("quantize", tiny, "--output", plain, fails=2)
    assert "cannot be read" in shoestring("quantize", tiny, "-o", "x", "--calibrate", "nowhere.txt", fails=2)
    text.write_text(" \n")
    assert "is empty" in shoestring("quantize", tiny, "-o", "x", "--calibrate", str(text), fails=2)


def test_models_lists_and_removes(shoestring, tmp_path):
    from folders import write_gguf

    listed = shoestring("models", "--json")["models"]
    assert [(m["name"], m["local"]) for m in listed] == [("smollm2-135m", False)]
    source = write_gguf(tmp_path / "tiny.gguf")
    pulled = shoestring("pull", str(source), "--json")
    name = next(m["name"] for m in shoestring("models", "--json")["models"] if m["kind"] == "converted")
    assert name in shoestring("models")
    assert shoestring("models", "--remove", name, "--json")["bytes"] == pulled["bytes"] > 0
    assert "no model" in shoestring("models", "--remove", name, fails=2)


def test_doctor_finds_and_explains(shoestring):
    findings = {finding["name"]: finding for finding in shoestring("doctor", "--json")["findings"]}
    assert findings["torch"]["ok"]
    assert findings["model smollm2-135m"]["remedy"] == "shoestring pull smollm2-135m"
    assert all(finding["remedy"] for finding in findings.values() if finding["ok"] is False)
    on_cpu = findings["fast feedforward on the CPU"]
    assert on_cpu["ok"] is findings["native step"]["ok"] or on_cpu["ok"] is None
    assert ("C++ kernels for" in on_cpu["detail"]) is (on_cpu["ok"] is True)
    gpus = [finding for name, finding in findings.items() if name.startswith("fast feedforward on ")][1:]
    assert gpus
    assert all("Triton kernels" in finding["detail"] for finding in gpus)
    assert "smollm2-135m" in shoestring("doctor")


def test_closed_pipe_is_quiet(tiny):
    command = [sys.executable, "-m", "shoestring", "generate", "hello", "--model", tiny, "-n", "90"]
    reader, writer = os.pipe()
    os.close(reader)  # `| head` that has gone
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_interrupt_leaves_whole_lines(tiny, write_lines, tmp_path):
    source = write_lines(*({"prompt": f"prompt {n}"} for n in range(3000)))
    target = tmp_path / "answers.jsonl"
    command = [
        sys.executable,
        "-m",
        "shoestring",
        "generate",
        "--input",
        str(source),
        "--output",
        str(target),
    ]
    command += ["--model", tiny, "-n", "20", "-d", "autoregressive"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (target.exists() and target.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("shoestring: interrupted\n")
    lines = target.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 3000
    assert all(json.loads(line)["line"] == number for number, line in enumerate(lines, 1))


def test_memory_error_is_one_line(shoestring, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("shoestring.model.load", fail)
    assert "out of memory" in shoestring("generate", "hello", fails=1)


def test_unexpected_error_is_one_line(shoestring, monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.setattr("shoestring.model.load", fail)
    line = shoestring("generate", "hello", fails=1)
    assert line.endswith("unexpected ZeroDivisionError: division by zero (--debug shows where)")


def test_run_returns_interrupt_code(monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("shoestring.model.load", interrupt)
    assert run(["generate", "hello"]) == 130
    assert capsys.readouterr().err.endswith("shoestring: interrupted\n")

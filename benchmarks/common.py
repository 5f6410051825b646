"""What the benchmarks share: arguments, chat prompts, rows kept in a resumable JSONL file."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoestring.evaluation.prompts import load_prompts


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--output", type=Path, help="write the result file here")
    return arguments


def tuning_prompts(name: str) -> list[str]:
    """The prompts of a set that `auto`'s priors were measured on; no result is taken on them."""
    return load_prompts(name, 40)[3::7][:6]


def held_out_prompts(name: str, count: int) -> list[str]:
    """`count` prompts of a set, evenly spread, none of which served for tuning."""
    tuned = set(tuning_prompts(name))
    prompts = [prompt for prompt in load_prompts(name) if prompt not in tuned]
    return [prompts[index * len(prompts) // count] for index in range(min(count, len(prompts)))]


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def finished_run(path: Path) -> dict[str, Any]:
    """A finished training run: its name, its recipe and its result."""
    import yaml

    from shoestring.training.folder import RunFolder

    result = RunFolder(path).result()
    if result is None:
        raise SystemExit(f"{path} holds no finished run")
    return {"run": path.name, "recipe": yaml.safe_load((path / "config.yaml").read_text()), **result}


class ResumableRows:
    """Rows of a long measurement, one JSON object a line: a key that is in the file is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the half-written last line of a killed run
                self.rows[row["key"]] = row
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))

    def missing(self, keys: list[str]) -> Iterator[str]:
        return (key for key in keys if key not in self.rows)

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = {"key": key, **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")

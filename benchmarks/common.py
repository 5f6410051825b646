"""What the benchmarks share: arguments, chat prompts, rows kept in a resumable JSONL file."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--output", type=Path, help="write the result file here")
    return arguments


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


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

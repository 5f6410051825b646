"""Result files as they are read: by `tables.py` for the documentation, from `benchmarks/results`."""

import json
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "Result", "load_results", "table"]

RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


def load_results(benchmark: str, folder: Path = RESULTS) -> list[tuple[str, Result]]:
    """(file name, content) of a benchmark's result files."""
    found = [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [(name, result) for name, result in found if result.get("benchmark") == benchmark]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])

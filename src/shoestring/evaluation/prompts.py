"""Prompt sets by name, read from the folder in `SHOESTRING_DATA`."""

import json
import os
from pathlib import Path

from shoestring.errors import RequestError, suggest

__all__ = ["PROMPT_SETS", "data_folder", "load_prompts"]

PROMPT_SETS = {
    "mt_bench": ("prompts/mt_bench.jsonl", lambda row: row["turns"][0]),
    "gsm8k": ("prompts/gsm8k_test.jsonl", lambda row: row["question"]),
    "humaneval": (
        "prompts/humaneval.jsonl",
        lambda row: f"Complete this Python function:\n\n```python\n{row['prompt'].rstrip()}\n```",
    ),
}


def data_folder() -> Path:
    """The folder that `SHOESTRING_DATA` names.

    Raises:
        RequestError: it is not set, or not a folder.
    """
    value = os.environ.get("SHOESTRING_DATA", "")
    if not value or not Path(value).is_dir():
        raise RequestError(
            f"SHOESTRING_DATA is {value!r}; set it to the folder that holds prompts/, qa/, ..."
        )
    return Path(value)


def load_prompts(name: str, count: int | None = None) -> list[str]:
    """The first `count` user turns of a prompt set (evenly spread where the set is grouped by category).

    Raises:
        RequestError: an unknown set, or its file is not there.
    """
    if name not in PROMPT_SETS:
        raise RequestError(
            f"unknown prompt set {name!r}{suggest(name, PROMPT_SETS)}; known: {', '.join(PROMPT_SETS)}"
        )
    file, turn = PROMPT_SETS[name]
    path = data_folder() / file
    if not path.is_file():
        raise RequestError(f"{path} is not there; SHOESTRING_DATA must name the folder that holds {file}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [turn(row) for row in rows]
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // count] for index in range(count)]

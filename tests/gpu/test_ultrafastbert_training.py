"""Pre-training on a GPU: compiled layers and plain ones take the same way, in bf16 and through the real command."""

import json
import random
from pathlib import Path

import pytest
import torch

from shoestring.cli import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RECIPE = Path(__file__).parent.parent.parent / "recipes" / "ultrafastbert-small.yaml"


@pytest.mark.filterwarnings("ignore")  # Inductor's own, of deprecated imports
def test_compiled_training_learns_what_plain_training_learns(tmp_path):
    draw, words = random.Random(0), ["north", "south", "east", "west", "wind", "rain"]
    (tmp_path / "text.txt").write_text(
        "\n\n".join(" ".join(f"{w} {w}" for w in draw.choices(words, k=20)) for _ in range(800))
    )
    losses = {}
    for compiled in ("true", "false"):
        path = tmp_path / compiled
        overrides = (
            f"data.train=['{tmp_path / 'text.txt'}']", "data.vocabulary=100", "data.length=32", "data.held_out=0.1",
            "model.feedforward=fff-1x6", "model.hidden_size=64", "model.layers=3", "model.heads=2", "batch_size=64",
            "steps=60", "warmup_steps=10", "evaluate_every=30", "save_every=60", "log_every=1", f"compile={compiled}",
        )  # fmt: skip
        assert run(["train", str(RECIPE), *overrides, "--output", str(path)]) == 0
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        losses[compiled] = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses["true"][-1] < losses["true"][0] - 0.3
    # Paths part where a logit's sign is a matter of rounding; the curves do not.
    assert losses["true"] == pytest.approx(losses["false"], abs=0.1)

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
from toy import train

from shoestring.errors import RequestError, TrainingError
from shoestring.training.averaging import averaged_weights
from shoestring.training.batches import BatchSampler, fixed_size_batches
from shoestring.training.schedules import schedule_factor


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed."""
    return train(tmp_path_factory.mktemp("runs") / "straight")


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def settled(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_learns_and_leaves_a_run_folder(straight):
    model, folder = straight
    model.eval()
    assert toy.accuracy(model)["accuracy"] > 0.6
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-35", "checkpoint-40"]
    steps = [row["step"] for row in folder.metrics("train")]
    assert steps == [1, *range(4, 41, 4)]
    assert [row["step"] for row in folder.metrics("validation")] == [20, 40]
    assert folder.metrics("train")[-1]["loss"] < folder.metrics("train")[0]["loss"]
    assert (folder.path / "config.yaml").read_text().startswith("task: toy")
    names = {path.name for path in (folder.path / "plots").iterdir()}
    assert {"loss.png", "validation_accuracy.png"} <= names
    assert not list(folder.path.rglob("training_args.bin"))


def test_killed_and_resumed_is_uninterrupted(straight, tmp_path):
    path = tmp_path / "killed"
    command = [sys.executable, str(Path(toy.__file__)), str(path), "0.05"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(path.glob("checkpoint-*/complete")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = max(int(p.parent.name[11:]) for p in path.glob("checkpoint-*/complete"))
    assert left < 40, "the run was over before it was killed"
    half = path / f"checkpoint-{left + 5}"
    half.mkdir(exist_ok=True)  # as if killed while it was written
    (half / "model.safetensors").write_bytes(b"torn")
    model, folder = train(path, resume=True)
    assert same_weights(model, straight[0])
    assert settled(folder.metrics("validation")) == settled(straight[1].metrics("validation"))
    assert [row["step"] for row in folder.metrics("train")][-3:] == [32, 36, 40]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint_of_that_step(straight, tmp_path, number):
    def interrupt(progress):
        if progress.step == 12 and progress.kind == "train":
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", interrupt)
    model, folder = train(tmp_path / "run", resume=True)
    assert same_weights(model, straight[0])
    steps = [row["step"] for row in folder.metrics("train")]
    assert steps == sorted(set(steps))


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(tmp_path / "run", poison=27, log_every=10)
    assert "checkpoint-10" in str(caught.value)
    assert "learning_rate" in str(caught.value)
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*/complete")]
    assert len(saved) == 2
    assert not (tmp_path / "run" / "checkpoint-15").exists()


def test_folder_refuses_what_would_be_overwritten(straight, tmp_path):
    path = straight[1].path
    with pytest.raises(RequestError, match="--resume goes on"):
        train(path)
    with pytest.raises(RequestError, match=r"learning_rate was 0.01 and is 0.02"):
        train(path, resume=True, learning_rate=0.02)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="holds no run"):
        train(tmp_path)


def test_resuming_a_run_that_has_all_steps_loads_it(straight):
    model, _ = train(straight[1].path, resume=True)
    assert same_weights(model, straight[0])


def test_every_epoch_has_each_example_once_in_another_order():
    sampler = BatchSampler(fixed_size_batches(50, 8), 12, 0)
    batches = list(sampler)
    assert len(batches) == 12
    assert sorted(i for batch in batches[:7] for i in batch) == list(range(50))
    assert batches[0] != batches[7]


def test_processes_share_the_batches():
    plan = fixed_size_batches(50, 8)
    everything = list(BatchSampler(plan, 20, 5))
    shares = [list(BatchSampler(plan, 10, 5, process, 2)) for process in range(2)]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == everything


def test_schedules():
    noam = schedule_factor("noam", 100, 1000)
    d_model = 512
    for step in (1, 50, 100, 400):
        paper = d_model**-0.5 * min(step**-0.5, step * 100**-1.5)
        assert noam(step - 1) * d_model**-0.5 * 100**-0.5 == pytest.approx(paper)
    assert schedule_factor("cosine", 0, 10)(0) == pytest.approx(1.0)
    assert schedule_factor("linear", 2, 10)(9) == pytest.approx(1 / 8)
    assert schedule_factor("constant", 2, 10)(0) == 0.5


def test_averaging_is_the_mean(straight):
    mean = averaged_weights(straight[1].checkpoints())
    from safetensors.torch import load_file

    parts = [load_file(path / "model.safetensors") for path in straight[1].checkpoints()]
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (parts[0][name] + parts[1][name]) / 2)
    with pytest.raises(RequestError, match="no checkpoints"):
        averaged_weights([])

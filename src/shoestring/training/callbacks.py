"""What happens beside the steps: metrics and plots, the live line, evaluation, and the reasons to stop."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from shoestring.errors import TrainingError
from shoestring.training.folder import RunFolder
from shoestring.training.interrupts import StopRequest
from shoestring.training.plots import plot_run
from shoestring.training.recipe import Recipe
from shoestring.training.task import Observer, Progress

__all__ = ["Recorder"]

_PLOT_SECONDS = 60.0


class Recorder(TrainerCallback):
    """Records what the loop logs, evaluates, saves and stops when it is asked to."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        observer: Observer,
        evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None,
        stop: StopRequest,
    ) -> None:
        self._recipe, self._folder, self._observer = recipe, folder, observer
        self._evaluate, self._stop = evaluate, stop
        self._items: torch.Tensor | int = 0
        self._since = self._began = 0.0
        self._drawn = time.perf_counter()
        self._first_step = 0
        self.stopped = False

    def count(self, items: torch.Tensor | int | None) -> None:
        """Add the labels of a step; nothing waits for the device."""
        if items is not None:
            self._items = self._items + items

    def not_a_number(self, what: str, step: int) -> TrainingError:
        """The error of a run that has gone astray, with what is left of it."""
        kept = self._folder.last_checkpoint()
        good = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return TrainingError(
            f"{what} is not a finite number at step {step}; {good}. Lower learning_rate "
            f"(now {self._recipe.learning_rate:g}), lengthen warmup_steps or set clip_norm, and begin anew with --output"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks."""
        self._since = self._began = time.perf_counter()
        self._first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the loss, and stop if it is not a number."""
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise self.not_a_number("the loss", state.global_step)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        values = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
        values["labels_per_second"] = round(int(self._items) / seconds, 1)
        values["seconds"] = round(now - self._began, 3)
        self._items = 0
        self._folder.record("train", state.global_step, values)
        done = state.global_step - self._first_step
        left = (now - self._began) / max(1, done) * (self._recipe.steps - state.global_step)
        self._observer(Progress("train", state.global_step, self._recipe.steps, values, left))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate where it is due; save and stop where someone asked for it."""
        step, every = state.global_step, self._recipe.evaluate_every
        if self._evaluate is not None and every and (step % every == 0 or step == self._recipe.steps):
            self._validate(kwargs["model"], step)
        if step == self._recipe.steps:
            control.should_log = True
            control.should_save = True
        if self._stop.asked:
            control.should_save = True
            control.should_training_stop = True
            self.stopped = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the curves so far, but not all the time."""
        last = state.global_step == self._recipe.steps or control.should_training_stop
        if self._folder.writes and (last or time.perf_counter() - self._drawn > _PLOT_SECONDS):
            plot_run(self._folder)
            self._drawn = time.perf_counter()

    def _validate(self, model: PreTrainedModel, step: int) -> None:
        assert self._evaluate is not None
        began = time.perf_counter()
        model.eval()
        with torch.no_grad():
            values = dict(self._evaluate(model))
        model.train()
        values["seconds"] = round(time.perf_counter() - began, 3)
        self._folder.record("validation", step, values)
        self._observer(Progress("validation", step, self._recipe.steps, values))
        self._since += time.perf_counter() - began  # evaluation is no training time

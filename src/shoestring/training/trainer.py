"""The loop: HF's `Trainer` with our batches, optimiser, schedule, run folder, exact resume, and a stop on NaN.

The model's `forward` takes a batch's tensors and `num_items_in_batch` (the labels that count in the whole optimiser
step, over all processes), and gives a loss divided by it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from shoestring.errors import RequestError
from shoestring.training.batches import BatchSampler, Plan
from shoestring.training.callbacks import Recorder
from shoestring.training.folder import RunFolder
from shoestring.training.interrupts import stop_requests
from shoestring.training.recipe import Recipe
from shoestring.training.schedules import schedule_factor
from shoestring.training.task import Observer, silent

__all__ = ["BatchTrainer", "resolved_device", "resolved_precision", "train_model"]

Evaluate = Callable[[PreTrainedModel], Mapping[str, float]]
Collate = Callable[[Sequence[Any]], dict[str, Any]]


def train_model(
    model: PreTrainedModel,
    examples: Sized,
    collate: Collate,
    plan: Plan,
    recipe: Recipe,
    folder: RunFolder,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluate: Evaluate | None = None,
    observer: Observer = silent,
    peak_learning_rate: float | None = None,
    epsilon: float = 1e-8,
) -> PreTrainedModel:
    """Train until `recipe.steps`, from the folder's last checkpoint if there is one; return the trained model.

    `collate` makes a batch of the examples whose indices `plan` gives (`examples[i]`). `evaluate` is called every
    `recipe.evaluate_every` steps. Seed before building the model (`transformers.set_seed`): its initial weights are the
    caller's.

    Raises:
        TrainingError: the loss or a weight is not a number any more.
        KeyboardInterrupt: SIGINT or SIGTERM; a checkpoint of the step it came in is there.
    """
    set_seed(recipe.seed)
    arguments = _arguments(recipe, folder)
    if recipe.compile:
        model.compile(dynamic=True)
    optimizer = _optimizer(
        model, recipe, peak_learning_rate or recipe.learning_rate, epsilon, arguments.device
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, schedule_factor(recipe.schedule, recipe.warmup_steps, recipe.steps)
    )
    with stop_requests() as stop:
        recorder = Recorder(recipe, folder, observer, evaluate, stop)
        trainer = BatchTrainer(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=examples,
            processing_class=tokenizer,
            optimizers=(optimizer, schedule),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.set_up(plan, recipe, folder, recorder)
        checkpoint = folder.last_checkpoint()
        step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        folder.rewind(step)
        if step < recipe.steps:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        elif checkpoint is not None:
            trainer._load_from_checkpoint(str(checkpoint))
    if recorder.stopped:
        raise KeyboardInterrupt
    return model


class BatchTrainer(Trainer):
    """HF's `Trainer` over batches that a plan decides, with checkpoints that are whole and finite."""

    def set_up(self, plan: Plan, recipe: Recipe, folder: RunFolder, recorder: Recorder) -> None:
        """Say what to train on and where it is kept."""
        self._plan, self._recipe, self._folder, self._recorder = plan, recipe, folder, recorder

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All batches of the run as one epoch; each process has its own share."""
        sampler = BatchSampler(
            self._plan,
            self._recipe.steps * self._recipe.accumulate,
            self._recipe.seed,
            self.args.process_index,
            self.args.world_size,
        )
        examples: Any = self.train_dataset  # anything with an item for each index
        return DataLoader(examples, batch_sampler=sampler, collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The next step's batches, and how many labels count in them."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._recorder.count(items)
        return samples, items

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the count walks all modules at every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Without transformers' `training_args.bin`, a pickle that nothing of ours reads.
        if self.args.should_save:
            assert output_dir is not None
            assert isinstance(self.model, PreTrainedModel)
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        norms = torch._foreach_norm([weight.detach() for weight in model.parameters()])
        if not torch.stack([norm.float() for norm in norms]).isfinite().all():
            raise self._recorder.not_a_number("a weight", self.state.global_step)
        super()._save_checkpoint(model, trial)
        checkpoint = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        self._folder.complete(checkpoint, self._recipe.keep_checkpoints)


def resolved_device(name: str) -> str:
    """`auto` as the device that it stands for: cuda, mps or cpu.

    Raises:
        RequestError: a device that is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name):
        raise RequestError(
            f"device {name!r} is not there; here are: auto, {', '.join(k for k in there if there[k])}"
        )
    return name


def resolved_precision(name: str, device: str) -> str:
    """`auto` as the precision that it stands for: bf16 on a GPU that computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _arguments(recipe: Recipe, folder: RunFolder) -> TrainingArguments:
    device = resolved_device(recipe.device)
    precision = resolved_precision(recipe.precision, device)
    return TrainingArguments(
        output_dir=str(folder.path),
        max_steps=recipe.steps,
        gradient_accumulation_steps=recipe.accumulate,
        max_grad_norm=recipe.clip_norm,
        bf16=precision == "bf16",
        tf32=True if precision == "tf32" and device == "cuda" else None,
        use_cpu=device == "cpu",
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter hides what must stop the run, and waits for the device every step
        save_steps=recipe.save_every,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


def _optimizer(
    model: nn.Module, recipe: Recipe, peak: float, epsilon: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) do not decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    model.to(device)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=peak,
        betas=recipe.betas,
        eps=epsilon,
        fused=device.type == "cuda",
    )

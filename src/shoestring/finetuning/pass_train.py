"""`task: pass`: look-ahead embeddings trained behind a frozen model, measured, and written down with their manifest."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import set_seed

from shoestring import hub
from shoestring.decoding.look_ahead import FILE_NAME, Base, LookAhead
from shoestring.errors import MissingDependencyError, TrainingError
from shoestring.finetuning.pass_acceptance import Acceptance, measure_acceptance, plot_acceptance
from shoestring.finetuning.pass_examples import examples_of, length_batches
from shoestring.finetuning.pass_model import (
    Example,
    LookAheadModel,
    collate,
    initial_embeddings,
    weights_hash,
)
from shoestring.finetuning.pass_recipe import PassRecipe
from shoestring.training.folder import RunFolder
from shoestring.training.task import Observer, Progress, Task, silent
from shoestring.training.trainer import resolved_device, resolved_precision, train_model

__all__ = ["TASK", "train_pass"]

_VALIDATION_EXAMPLES = 16


def train_pass(recipe: PassRecipe, folder: RunFolder, observer: Observer = silent) -> dict[str, Any]:
    """Train by a recipe, or go on with a run; return what it came to.

    The folder then holds `look_ahead.safetensors`, which `load(..., look_ahead=folder)` takes.

    Raises:
        RequestError: no data, or texts that are too short.
        TrainingError: the loss went astray, or the frozen model's weights have changed.
        UnsupportedModelError: the model cannot be run with look-ahead rows.
    """
    set_seed(recipe.seed)
    device = resolved_device(recipe.device)
    precision = resolved_precision(recipe.precision, device)
    pretrained = hub.load_pretrained(
        recipe.model, device=device, dtype="bfloat16" if precision == "bf16" else "float32"
    )
    base: Any = pretrained.model
    before = weights_hash(base)
    train, held_out = examples_of(
        recipe,
        base,
        pretrained.tokenizer,
        folder.path / "answers.jsonl",
        lambda done, total: observer(Progress("answers", done, total, {})),
    )
    start = initial_embeddings(base, recipe.tokens, recipe.initial, recipe.seed)
    model: Any = LookAheadModel(base, start, recipe.loss, recipe.decay)
    model.to(device)

    def measured(examples: Sequence[Example]) -> Acceptance:
        return measure_acceptance(
            model, examples, recipe.data.batch_size, recipe.data.insertions, recipe.seed
        )

    def evaluate(_: Any) -> Mapping[str, float]:
        summary = measured(held_out[:_VALIDATION_EXAMPLES]).summary()
        return {name: value for name, value in summary.items() if isinstance(value, float)}

    try:
        untrained = measured(held_out)
        train_model(
            model,
            train,
            _collate(recipe),
            length_batches(train, recipe.data.batch_size),
            # The base computes in the recipe's precision by itself; nothing is to be cast around it.
            recipe.model_copy(update={"precision": "fp32"}),
            folder,
            evaluate=evaluate,
            observer=observer,
        )
        trained = measured(held_out)
    finally:
        model.close()
    after = weights_hash(base)
    if after != before:
        raise TrainingError(f"the frozen model's weights have changed: {before[:12]} became {after[:12]}")
    results = {
        "trained": trained.summary(),
        "untrained": untrained.summary(),
        "candidates": len(trained.conditional[0]),
        "acceptance": trained.conditional,
        "base_unchanged": True,
        "parameters": model.look_ahead.numel(),
    }
    result = {
        "tokens": recipe.tokens,
        "training_texts": len(train),
        "training_tokens": sum(len(example.tokens) for example in train),
        "held_out_texts": len(held_out),
        **results,
    }
    if folder.writes:
        manifest = {
            "base": {
                "name": pretrained.name,
                **Base.of_module(base).describe(),
                "sha256": before,
                "precision": precision,
            },
            "data": {
                "texts": [source.path for source in recipe.data.texts],
                "prompts": [source.path for source in recipe.data.prompts],
                "training_tokens": result["training_tokens"],
            },
            "recipe": recipe.model_dump(mode="json"),
            "results": results,
        }
        LookAhead(model.look_ahead.detach(), manifest).save(folder.path / FILE_NAME)
        try:
            plot_acceptance(
                folder.path / "plots" / "acceptance_by_position.png",
                {"trained": trained, "untrained": untrained},
            )
        except MissingDependencyError as error:
            observer(Progress("plots", 0, 0, {"left out": str(error)}))
    folder.finish(result)
    return result


def _collate(recipe: PassRecipe) -> Any:
    def batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        # Insertion points are a function of the batch's texts and the seed: a resumed run draws the same.
        chance = random.Random(
            f"{recipe.seed}/{[(len(e.tokens), e.start, *e.tokens[-8:]) for e in examples]}"
        )
        return collate(examples, recipe.tokens, recipe.data.insertions, chance)

    return batch


TASK = Task(PassRecipe, train_pass)

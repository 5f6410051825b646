"""`task: fff-conversion`: students are taught beside the frozen model and put in its layers' places; what that costs."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, set_seed

from shoestring import hub
from shoestring.errors import RequestError
from shoestring.fastff.bert_config import UltraFastBertConfig
from shoestring.fastff.bert_recipe import feedforward_of
from shoestring.fastff.conversion_scoring import Nothing, layer_errors, model_loss, speeds
from shoestring.fastff.convert import save_converted
from shoestring.fastff.imitation import Distillation, Together
from shoestring.fastff.masked_scoring import load_auto
from shoestring.fastff.masking import MaskedRows
from shoestring.fastff.sites import Site, replaced
from shoestring.fastff.text_source import read_documents
from shoestring.fastff.token_rows import is_held_out, rows_of
from shoestring.training.batches import fixed_size_batches
from shoestring.training.folder import RunFolder
from shoestring.training.recipe import Recipe, Section
from shoestring.training.task import Observer, Progress, Task, silent
from shoestring.training.trainer import resolved_device, train_model

__all__ = ["TASK", "ConversionRecipe", "train"]

Count = Annotated[int, Field(ge=1)]
_VALIDATED_ROWS = 64


class RowSettings(Section):
    """The text for the model to read: the first `rows` rows of `length` tokens, and `held_out_rows` of other documents."""

    train: Annotated[list[str], Field(min_length=1)]
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02
    length: Annotated[int, Field(ge=4)] = 128
    rows: Count = 20000
    held_out_rows: Count = 200


class ConversionRecipe(Recipe):
    """Which `layers` of `model` (None: all) become what: `fff-1x11` or, as a control, `dense-12`.

    They learn apart from each other for `steps`, then for `together_steps` in their places, from the model's own choices.
    """

    task: Literal["fff-conversion"]
    model: str
    layers: list[int] | None = None
    feedforward: str = "fff-1x11"
    data: RowSettings
    together_steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 16
    speed_tokens: Count = 32

    @field_validator("feedforward")
    @classmethod
    def _known(cls, value: str) -> str:
        feedforward_of(value)
        return value


def train(recipe: ConversionRecipe, folder: RunFolder, observer: Observer = silent) -> dict[str, Any]:
    """Teach, replace, measure; write `final/` (see `load_converted`) and `result.json`.

    The result has each layer's held-out error, the model's loss on held-out text as it was, converted, and with the chosen
    feedforwards left out altogether, and seconds for a row and for a generated token before and after.

    Raises:
        RequestError: no such model, layer or text.
        UnsupportedModelError: no feedforward of the model can be replaced.
        TrainingError: the loss is not a number any more.
    """
    device = resolved_device(recipe.device)
    teacher, tokenizer, masked = _teacher(recipe.model, device)
    rows = {
        name: rows_of(_documents(recipe, name), tokenizer, _end(tokenizer, recipe.model), recipe.data.length)[
            :count
        ]
        for name, count in (("train", recipe.data.rows), ("held_out", recipe.data.held_out_rows))
    }
    set_seed(recipe.seed)
    apart: Any = Distillation(teacher, recipe.layers, recipe.feedforward)
    apart.to(device)
    apart.calibrate(_plain(list(rows["train"][: recipe.batch_size]), device)["input_ids"])
    about = {
        "model": recipe.model,
        "feedforward": recipe.feedforward,
        "layers": [site.layer for site in apart.sites],
        "parameters": teacher.num_parameters(),
        "student_parameters": sum(weight.numel() for weight in apart.parameters()),
        "rows": {name: len(part) for name, part in rows.items()},
    }
    observer(Progress("data", 0, 0, {"layers": len(apart.sites), **about["rows"]}))

    def learn(model: Any, stage: str, steps: int, evaluate: Callable[[Any], dict[str, float]]) -> RunFolder:
        own = recipe.model_copy(update={"steps": steps})
        inner = RunFolder.open(folder.path / stage, own, resume=True)
        examples, collate, plan = _batches(recipe, rows["train"], tokenizer, device, masked)
        train_model(model, examples, collate, plan, own, inner, evaluate=evaluate, observer=observer)
        return inner

    def loss() -> dict[str, float]:
        return model_loss(teacher, tokenizer, rows["held_out"], device, masked)

    def apart_now(model: Any) -> dict[str, float]:
        errors = layer_errors(model, rows["held_out"][:_VALIDATED_ROWS], device)
        return {"layer_error": statistics.mean(errors)}

    def together_now(model: Any) -> dict[str, float]:
        with replaced(teacher, model.modules_by_site()):
            return model_loss(teacher, tokenizer, rows["held_out"][:_VALIDATED_ROWS], device, masked)

    stages = [learn(apart, "apart", recipe.steps, apart_now)]
    apart.eval()
    modules: dict[Site, nn.Module] = apart.modules_by_site()
    result = {**about, "layer_errors": layer_errors(apart, rows["held_out"], device), "before": loss()}
    with replaced(teacher, modules):
        result["after"] = loss()
    if recipe.together_steps:
        together: Any = Together(teacher, modules)
        together.to(device)
        stages.append(learn(together, "together", recipe.together_steps, together_now))
        modules = together.eval().modules_by_site()
        with replaced(teacher, modules):
            result["after_together"] = loss()
    if not folder.writes:
        return {}
    with replaced(teacher, {site: Nothing() for site in modules}):
        result["left_out"] = loss()
    result["speed"] = speeds(
        teacher, modules, rows["held_out"], device, tokens=recipe.speed_tokens, masked=masked
    )
    result["training_seconds"] = sum(stage.training_seconds() for stage in stages)
    save_converted(teacher, tokenizer, modules, recipe.feedforward, folder.path / "final")
    result["converted_parameters"] = sum(weight.numel() for weight in teacher.parameters())
    folder.finish(result)
    return result


TASK = Task(ConversionRecipe, train)


def _teacher(name: str, device: str) -> tuple[Any, Any, bool]:
    """The model, its tokenizer, and whether it is a masked language model (by what its folder says it was trained as)."""
    from transformers import AutoConfig

    from shoestring.fastff import bert

    bert.register()
    if (Path(name) / "config.yaml").is_file():
        return *load_auto(name, AutoModelForMaskedLM, device), True
    folder = hub.resolve(name)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kinds = config.architectures or []
    if isinstance(config, UltraFastBertConfig) or any("MaskedLM" in kind for kind in kinds):
        return *load_auto(str(folder), AutoModelForMaskedLM, device), True
    found = hub.load_pretrained(name, dtype="float32", device=device)
    return found.model, found.tokenizer, False


def _end(tokenizer: Any, name: str) -> int:
    """The token that goes behind a document."""
    ids = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("sep", "eos"))
    for token in ids:
        if token is not None:
            return int(token)
    raise RequestError(f"{name} has no tokenizer with a token that ends a text")


def _documents(recipe: ConversionRecipe, part: str) -> Iterator[list[str]]:
    """Documents of a part until there is text enough for its rows (eight characters a token are more than enough)."""
    rows = recipe.data.rows if part == "train" else recipe.data.held_out_rows
    left = rows * recipe.data.length * 8
    for document in read_documents(recipe.data.train):
        if is_held_out(document, recipe.data.held_out) == (part == "held_out"):
            yield document
            left -= sum(map(len, document))
            if left <= 0:
                return


def _batches(
    recipe: ConversionRecipe, rows: np.ndarray, tokenizer: Any, device: str, masked: bool
) -> tuple[Any, Any, Any]:
    """Examples, how to make a batch of them, and which: with hidden tokens for a model that fills them in."""
    if masked:
        hider = MaskedRows(rows, tokenizer, share=0.25, corrupt=False, device=device, seed=recipe.seed)
        return hider, hider.collate, hider.plan(recipe.batch_size)

    def collate(batch: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        return _plain(batch, device)

    return rows, collate, fixed_size_batches(len(rows), recipe.batch_size)


def _plain(batch: Sequence[np.ndarray], device: str) -> dict[str, Tensor]:
    """Rows as `input_ids` and `labels` [B, T]; what is learnt is not the labels, but their number counts."""
    input_ids = torch.from_numpy(np.stack(batch).astype(np.int64)).to(device)
    return {"input_ids": input_ids, "labels": input_ids}

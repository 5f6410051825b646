"""`task: fff-conversion`: students are taught beside the frozen model and put in its layers' places; what that costs."""

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedModel, set_seed

from shoestring import hub
from shoestring.fastff.bert_config import UltraFastBertConfig
from shoestring.fastff.bert_recipe import feedforward_of
from shoestring.fastff.convert import Distillation, Site, replaced, save_converted
from shoestring.fastff.masked_scoring import load_auto, masked_batches, score_masked
from shoestring.fastff.text_source import read_documents
from shoestring.fastff.token_rows import is_held_out, rows_of
from shoestring.training.batches import fixed_size_batches
from shoestring.training.folder import RunFolder
from shoestring.training.recipe import Recipe, Section
from shoestring.training.task import Observer, Progress, Task, silent
from shoestring.training.trainer import resolved_device, train_model

__all__ = ["TASK", "ConversionRecipe", "causal_loss", "train"]

Count = Annotated[int, Field(ge=1)]


class RowSettings(Section):
    """The text for the model to read: the first `rows` rows of `length` tokens, and `held_out_rows` of other documents."""

    train: Annotated[list[str], Field(min_length=1)]
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02
    length: Annotated[int, Field(ge=4)] = 128
    rows: Count = 20000
    held_out_rows: Count = 200


class ConversionRecipe(Recipe):
    """Which `layers` of `model` (None: all) become what: `fff-1x11` or, as a control, `dense-12`."""

    task: Literal["fff-conversion"]
    model: str
    layers: list[int] | None = None
    feedforward: str = "fff-1x11"
    data: RowSettings
    batch_size: Count = 16
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    speed_tokens: Annotated[int, Field(ge=0)] = 32

    @field_validator("feedforward")
    @classmethod
    def _known(cls, value: str) -> str:
        feedforward_of(value)
        return value


def train(recipe: ConversionRecipe, folder: RunFolder, observer: Observer = silent) -> dict[str, Any]:
    """Teach, replace, measure; write `final/` (see `load_converted`) and `result.json`.

    The result has each layer's held-out error, the model's loss on held-out text as it was, converted, and with the chosen
    feedforwards left out altogether, and seconds for a prompt and for a generated token before and after.

    Raises:
        RequestError: no such model, layer or text.
        UnsupportedModelError: no feedforward of the model can be replaced.
        TrainingError: the loss is not a number any more.
    """
    device = resolved_device(recipe.device)
    teacher, tokenizer, masked = _teacher(recipe.model, device)
    end = tokenizer.sep_token_id if masked else tokenizer.eos_token_id
    rows = {
        name: rows_of(_documents(recipe, name), tokenizer, end, recipe.data.length)[:count]
        for name, count in (("train", recipe.data.rows), ("held_out", recipe.data.held_out_rows))
    }

    def collate(batch: Sequence[np.ndarray]) -> dict[str, Tensor]:
        input_ids = torch.from_numpy(np.stack(batch).astype(np.int64)).to(device)
        return {"input_ids": input_ids, "labels": input_ids}

    set_seed(recipe.seed)
    model: Any = Distillation(teacher, recipe.layers, recipe.feedforward)
    model.to(device)
    model.calibrate(collate(list(rows["train"][: recipe.batch_size]))["input_ids"])
    about = {
        "model": recipe.model,
        "feedforward": recipe.feedforward,
        "layers": [site.layer for site in model.sites],
        "parameters": teacher.num_parameters(),
        "student_parameters": model.num_parameters(),
        "rows": {name: len(part) for name, part in rows.items()},
    }
    observer(Progress("data", 0, 0, {"layers": len(model.sites), **about["rows"]}))

    def evaluate(current: Any) -> dict[str, float]:
        return {"layer_error": statistics.mean(_layer_errors(current, rows["held_out"], device))}

    train_model(
        model,
        rows["train"],
        collate,
        fixed_size_batches(len(rows["train"]), recipe.batch_size),
        recipe,
        folder,
        evaluate=evaluate,
        observer=observer,
    )
    if not folder.writes:
        return {}
    model.eval()
    modules = model.modules_by_site()
    nothing: dict[Site, nn.Module] = {site: _Nothing() for site in modules}

    def loss() -> dict[str, float]:
        if masked:
            batches = masked_batches(rows["held_out"], tokenizer, corrupt=False, device=device)
            score = score_masked(teacher, batches)[0]
            return {"loss": score.loss, "perplexity": score.perplexity}
        found = causal_loss(teacher, rows["held_out"], device)
        return {"loss": found, "perplexity": float(np.exp(found))}

    result: dict[str, Any] = {
        **about,
        "layer_errors": _layer_errors(model, rows["held_out"], device),
        "before": loss(),
    }
    with replaced(teacher, modules):
        result["after"] = loss()
    with replaced(teacher, nothing):
        result["left_out"] = loss()
    if recipe.speed_tokens:
        result["speed"] = _speed(teacher, modules, rows["held_out"], device, recipe.speed_tokens, masked)
    result["training_seconds"] = folder.training_seconds()
    save_converted(teacher, tokenizer, modules, recipe.feedforward, folder.path / "final")
    result["converted_parameters"] = teacher.num_parameters()
    folder.finish(result)
    return result


TASK = Task(ConversionRecipe, train)


@torch.no_grad()
def causal_loss(model: Any, rows: np.ndarray, device: str, size: int = 8) -> float:
    """Nats a token of rows [N, T], each begun without context."""
    total = 0.0
    for start in range(0, len(rows), size):
        ids = torch.from_numpy(rows[start : start + size].astype(np.int64)).to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (len(rows) * (rows.shape[1] - 1))


class _Nothing(nn.Module):
    """A feedforward that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the same shape."""
        return torch.zeros_like(x)


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


def _documents(recipe: ConversionRecipe, part: str) -> Iterator[list[str]]:
    """Documents of a part until there are tokens enough for its rows (a token has at least a character)."""
    rows = recipe.data.rows if part == "train" else recipe.data.held_out_rows
    left = rows * recipe.data.length * 8
    for document in read_documents(recipe.data.train):
        if is_held_out(document, recipe.data.held_out) == (part == "held_out"):
            yield document
            left -= sum(map(len, document))
            if left <= 0:
                return


@torch.no_grad()
def _layer_errors(model: Any, rows: np.ndarray, device: str, size: int = 8) -> list[float]:
    """Of each student on these rows; batches of equal weight."""
    found = [
        model.forward(torch.from_numpy(rows[start : start + size].astype(np.int64)).to(device))["errors"]
        for start in range(0, len(rows), size)
    ]
    return [float(value) for value in torch.stack(found).mean(0)]


@torch.no_grad()
def _speed(
    model: PreTrainedModel,
    modules: dict[Site, nn.Module],
    rows: np.ndarray,
    device: str,
    tokens: int,
    masked: bool,
    repetitions: int = 5,
) -> dict[str, dict[str, float]]:
    """Median seconds of one row's forward pass and, of a causal model, of a generated token; before and after, in turns."""
    ids = torch.from_numpy(rows[:1].astype(np.int64)).to(device)
    taken: dict[str, dict[str, list[float]]] = {}

    def once(name: str) -> None:
        kinds = taken.setdefault(name, {})
        runs = {"row": lambda: model(input_ids=ids)}
        if not masked:
            runs["generated_token"] = lambda: _generated(model, ids, tokens)
        for kind, act in runs.items():
            began = time.perf_counter()
            act()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            each = tokens if kind == "generated_token" else 1
            kinds.setdefault(kind, []).append((time.perf_counter() - began) / each)

    for _ in range(repetitions + 1):  # the first of each warms up
        once("before")
        with replaced(model, modules):
            once("after")
    return {
        name: {kind: statistics.median(times[1:]) for kind, times in kinds.items()}
        for name, kinds in taken.items()
    }


def _generated(model: Any, ids: Tensor, tokens: int) -> None:
    """Tokens behind the first of the row, greedily, with a cache."""
    cache, last = None, ids[:, :1]
    for _ in range(tokens):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)

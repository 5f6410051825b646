"""Fine-tuning an encoder to classify texts, over several seeds, with intervals (arXiv 2311.10770, section 3.2)."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from shoestring.errors import RequestError
from shoestring.evaluation.accuracy import Accuracy, accuracy_of
from shoestring.fastff.classification_data import PARTS, LabelledText, TextSet, read_text_set
from shoestring.fastff.classification_recipe import ClassificationRecipe
from shoestring.fastff.masked_scoring import load_auto
from shoestring.hub.quiet import quiet_transformers
from shoestring.training.batches import fixed_size_batches
from shoestring.training.folder import RunFolder
from shoestring.training.task import Observer, Progress, Task, silent
from shoestring.training.trainer import resolved_device, train_model

__all__ = ["TASK", "EncodedTexts", "classify", "evaluate_classifier", "matthews", "train"]

Example = tuple[list[int], int]


class EncodedTexts:
    """Token ids of one text or two, [SEP] behind each, and their classes; the last text is cut where they are too long."""

    def __init__(self, texts: Sequence[LabelledText], tokenizer: Any, max_tokens: int, device: str) -> None:
        self._pad, self._device = tokenizer.pad_token_id or 0, torch.device(device)
        pairs = [row.texts for row in texts]
        firsts = [pair[0] for pair in pairs]
        seconds = [pair[1] for pair in pairs] if pairs and len(pairs[0]) > 1 else None
        encoded = tokenizer(
            firsts,
            seconds,
            truncation="longest_first" if seconds is None else "only_second",
            max_length=max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        self.examples = list(zip(encoded["input_ids"], [row.label for row in texts], strict=True))

    def collate(self, batch: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [B, T], padded on the right to a multiple of 32; `labels` [B]."""
        longest = -(-max(len(ids) for ids, _ in batch) // 32) * 32
        lengths = torch.tensor([len(ids) for ids, _ in batch])
        found = {
            "input_ids": torch.tensor([ids + [self._pad] * (longest - len(ids)) for ids, _ in batch]),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "labels": torch.tensor([label for _, label in batch]),
        }
        return {name: tensor.to(self._device) for name, tensor in found.items()}


@torch.no_grad()
def classify(model: Any, texts: EncodedTexts, size: int = 64) -> list[int]:
    """The class of each example, in order; of similar length at a time."""
    order = sorted(range(len(texts.examples)), key=lambda index: len(texts.examples[index][0]))
    found = [0] * len(order)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = texts.collate([texts.examples[index] for index in part])
        logits = model.forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for index, kind in zip(part, logits.argmax(-1).tolist(), strict=True):
            found[index] = kind
    return found


def train(recipe: ClassificationRecipe, folder: RunFolder, observer: Observer = silent) -> dict[str, Any]:
    """Fine-tune once for each seed (or go on); write `result.json`, and the best on validation as `final/`.

    Raises:
        RequestError: no such model or data.
        TrainingError: the loss is not a number any more.
    """
    texts = read_text_set(recipe.data)
    sizes = {part: len(rows) for part, rows in texts.parts.items()}
    observer(Progress("data", 0, 0, {"classes": len(texts.classes), **sizes}))
    runs: list[dict[str, Any]] = []
    best: tuple[float, PreTrainedModel, Any] | None = None
    for number in range(recipe.seeds):
        seeded = recipe.model_copy(update={"seed": recipe.seed + number})
        inner = RunFolder.open(folder.path / f"seed-{seeded.seed}", seeded, resume=True)
        model, tokenizer, parts = _train_one(seeded, inner, texts, observer)
        model.eval()
        scores: dict[str, dict[str, Any]] = {}
        for part in ("validation", "test"):
            labels = [row.label for row in texts.parts[part]]
            predicted = classify(model, parts[part])
            scores[part] = asdict(accuracy_of(predicted, labels)) | {"matthews": matthews(predicted, labels)}
            observer(Progress(f"seed {seeded.seed}, {part}", 0, 0, {"accuracy": scores[part]["accuracy"]}))
        runs.append({"seed": seeded.seed, "training_seconds": inner.training_seconds(), **scores})
        if best is None or scores["validation"]["accuracy"] > best[0]:
            best = (scores["validation"]["accuracy"], model, tokenizer)
    assert best is not None
    if not folder.writes:
        return {}
    with quiet_transformers():
        best[1].save_pretrained(folder.path / "final")
        best[2].save_pretrained(folder.path / "final")
    tests = [run["test"]["accuracy"] for run in runs]
    result = {
        "model": recipe.model,
        "data": {"name": recipe.data, "source": texts.source, "classes": texts.classes, **sizes},
        "parameters": best[1].num_parameters(),
        "test_accuracy": statistics.mean(tests),
        "test_accuracy_spread": statistics.stdev(tests) if len(tests) > 1 else None,
        "majority_rate": runs[0]["test"]["majority_rate"],
        "seeds": runs,
    }
    folder.finish(result)
    return result


TASK = Task(ClassificationRecipe, train)


def _train_one(
    recipe: ClassificationRecipe, folder: RunFolder, texts: TextSet, observer: Observer
) -> tuple[PreTrainedModel, Any, dict[str, EncodedTexts]]:
    device = resolved_device(recipe.device)
    set_seed(recipe.seed)  # the classifier's first weights
    model, tokenizer = load_auto(
        recipe.model,
        AutoModelForSequenceClassification,
        "cpu",
        num_labels=len(texts.classes),
        id2label=dict(enumerate(texts.classes)),
        label2id={name: number for number, name in enumerate(texts.classes)},
    )
    _set_dropout(model, recipe.dropout)
    parts = {
        part: EncodedTexts(rows, tokenizer, recipe.max_tokens, device) for part, rows in texts.parts.items()
    }
    labels = [row.label for row in texts.parts["validation"]]

    def evaluate(current: PreTrainedModel) -> dict[str, float]:
        return {"accuracy": accuracy_of(classify(current, parts["validation"]), labels).accuracy}

    train_model(
        model,
        parts["train"].examples,
        parts["train"].collate,
        fixed_size_batches(len(parts["train"].examples), recipe.batch_size),
        recipe,
        folder,
        tokenizer=tokenizer,
        evaluate=evaluate,
        observer=observer,
    )
    return model, tokenizer, parts


def evaluate_classifier(
    model: str, data: str = "boolq", part: str = "test", *, max_tokens: int = 256, device: str = "cpu"
) -> Accuracy:
    """Score a classifier (a run's folder, a model's, a hub id) on a part of a set.

    Raises:
        RequestError: no such model, set or part, or a model with other classes than the set's.
    """
    if part not in PARTS:
        raise RequestError(f"{part!r} is no part; there are {', '.join(PARTS)}")
    texts = read_text_set(data)
    loaded, tokenizer = load_auto(model, AutoModelForSequenceClassification, device)
    classes = [loaded.config.id2label.get(number) for number in range(len(loaded.config.id2label))]
    if classes != texts.classes:
        raise RequestError(
            f"{model} knows the classes {classes} and {data} has {texts.classes}: fine-tune it first"
        )
    rows = texts.parts[part]
    predicted = classify(loaded, EncodedTexts(rows, tokenizer, max_tokens, device))
    return accuracy_of(predicted, [row.label for row in rows])


def matthews(predicted: Sequence[int], labels: Sequence[int]) -> float | None:
    """The correlation of two-class predictions with their labels (CoLA's score); None for other numbers of classes."""
    if not set(predicted) | set(labels) <= {0, 1}:
        return None
    pairs = list(zip(predicted, labels, strict=True))
    a, b, c, d = (pairs.count(kind) for kind in ((1, 1), (0, 0), (1, 0), (0, 1)))
    below = ((a + c) * (a + d) * (b + c) * (b + d)) ** 0.5
    return (a * b - c * d) / below if below else 0.0


def _set_dropout(model: Any, dropout: float) -> None:
    """In our own models and in the modules of others."""
    if hasattr(model.config, "dropout"):
        model.config.dropout = dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout

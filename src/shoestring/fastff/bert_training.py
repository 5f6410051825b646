"""A masked language model from its recipe: vocabulary, rows, training, and what the held-out part says (2311.10770)."""

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from shoestring.fastff.bert import UltraFastBertForMaskedLM
from shoestring.fastff.bert_recipe import BertRecipe, TextSettings
from shoestring.fastff.masked_scoring import masked_batches, score_masked
from shoestring.fastff.masking import MaskedRows
from shoestring.fastff.pieces import learn_pieces
from shoestring.fastff.routing import routing_statistics
from shoestring.fastff.scattered import ScatteredFastFeedForward
from shoestring.fastff.text_source import fingerprint, read_documents
from shoestring.fastff.token_rows import PreparedCorpus, is_held_out, prepare_corpus
from shoestring.hub.cache import locked
from shoestring.hub.quiet import quiet_transformers
from shoestring.training.folder import RunFolder
from shoestring.training.task import Observer, Progress, Task, silent
from shoestring.training.trainer import resolved_device, train_model

__all__ = ["LOSSES_FILE", "TASK", "prepared_for", "train"]

LOSSES_FILE = "held_out_losses.npy"
_VALIDATED_ROWS = 512  # during the run; the end is measured on all
_COUNTED_ROWS = 2048  # whose tokens' paths are counted


def train(recipe: BertRecipe, folder: RunFolder, observer: Observer = silent) -> dict[str, Any]:
    """Train (or go on), score the held-out part in fp32, count paths, write `final/` and `result.json`.

    Raises:
        RequestError: a text that cannot be read, or is too short.
        TrainingError: the loss is not a number any more.
    """
    device = resolved_device(recipe.device)
    corpus, tokenizer = prepared_for(recipe.data, folder.path.parent, observer, writes=folder.writes)
    rows = MaskedRows(
        corpus.train, tokenizer, share=recipe.masked, corrupt=recipe.corrupt, device=device, seed=recipe.seed
    )
    set_seed(recipe.seed)
    config = recipe.model.config(len(tokenizer))
    model: Any = UltraFastBertForMaskedLM(config)
    for module in model.modules():
        if isinstance(module, ScatteredFastFeedForward):
            module.training_method = recipe.method
            # A part of the loss for each layer, and one of each of a step's batches.
            module.balance = recipe.balance / config.layers / recipe.accumulate
    about = {
        "parameters": model.num_parameters(),
        "feedforward": recipe.model.feedforward,
        "neurons": config.neurons,
        "active_neurons": config.active_neurons,
        "training_operations": config.training_operations(recipe.data.length, recipe.masked),
        "data": corpus.about,
    }
    tokens = recipe.steps * recipe.accumulate * min(recipe.batch_size, len(rows)) * recipe.data.length
    about |= {"tokens": tokens, "epochs": round(tokens / corpus.train.size, 2)}
    observer(Progress("data", 0, 0, {name: about[name] for name in ("parameters", "tokens", "epochs")}))

    def hidden(count: int) -> Iterator[dict[str, Tensor]]:
        return masked_batches(
            corpus.held_out[:count], tokenizer, share=recipe.masked, corrupt=recipe.corrupt, device=device
        )

    def evaluate(current: PreTrainedModel) -> dict[str, float]:
        with torch.compiler.set_stance("force_eager"):  # not compiled for these shapes, too
            score, _ = score_masked(current, hidden(_VALIDATED_ROWS))
            routing = routing_statistics(current, itertools.islice(hidden(_VALIDATED_ROWS), 4))
        values = {"loss": score.loss, "perplexity": score.perplexity, "accuracy": score.accuracy}
        return values | _mean(routing)

    if recipe.compile:
        # Shapes never change here, which the loop of all tasks cannot know; and what is compiled for one layer serves all.
        for layer in model.encoder.layers:
            layer.compile(dynamic=False)
    train_model(
        model,
        rows,
        rows.collate,
        rows.plan(recipe.batch_size),
        recipe.model_copy(update={"compile": False}),
        folder,
        tokenizer=tokenizer,
        evaluate=evaluate,
        observer=observer,
        epsilon=1e-12,
    )
    if not folder.writes:
        return {}
    with quiet_transformers():
        model.save_pretrained(folder.path / "final")
        tokenizer.save_pretrained(folder.path / "final")
        # As it will be used: in fp32, and without what training wrapped around it.
        final: Any = UltraFastBertForMaskedLM.from_pretrained(folder.path / "final")
    final.to(device).eval()
    score, losses = score_masked(final, hidden(len(corpus.held_out)))
    np.save(folder.path / LOSSES_FILE, losses)
    result = {
        **about,
        "training_seconds": folder.training_seconds(),
        "held_out": asdict(score),
        "routing": routing_statistics(final, hidden(_COUNTED_ROWS)),
    }
    folder.finish(result)
    return result


TASK = Task(BertRecipe, train)


def prepared_for(
    data: TextSettings, beside: Path, observer: Observer = silent, *, writes: bool = True
) -> tuple[PreparedCorpus, PreTrainedTokenizerFast]:
    """The rows and the tokenizer of this text, made once for all runs in the folder `beside`.

    A process that does not write waits for the one that does.

    Raises:
        RequestError: a text that cannot be read, or is too short.
    """
    wanted = {**data.model_dump(mode="json"), "text": fingerprint(data.train)}
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    folder = beside / f"prepared-{name}"
    # Runs that begin at once wait for the first; so does a process of the same run that does not write.
    while not writes and not (folder / "about.json").is_file():
        time.sleep(1)
    with locked(f"prepared-{name}"):
        tokenizer = None
        if not (folder / "about.json").is_file():
            observer(Progress("tokenizer", 0, 0, {"pieces": data.vocabulary}))
            tokenizer = learn_pieces(
                _sampled(data), data.vocabulary, kind=data.tokenizer, lowercase=data.lowercase
            )
            observer(Progress("rows", 0, 0, {"length": data.length}))
        corpus = prepare_corpus(
            folder, read_documents(data.train), tokenizer, length=data.length, held_out=data.held_out
        )
    return corpus, PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def _sampled(data: TextSettings) -> Iterator[str]:
    left = data.tokenizer_characters
    for document in read_documents(data.train):
        if not is_held_out(document, data.held_out):
            for paragraph in document:
                yield paragraph
                left -= len(paragraph)
        if left <= 0:
            return


def _mean(layers: list[dict[str, Any]]) -> dict[str, float]:
    """The layers' mean of what is worth a curve."""
    if not layers:
        return {}
    return {
        "dead_nodes": statistics.mean(row["dead_nodes"] for row in layers),
        "leaf_evenness": statistics.mean(row["evenness"][-1] for row in layers),
    }

"""What a conversion costs and gains: each layer's error, the model's loss, and seconds, on text that taught nothing."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.fastff.masked_scoring import masked_batches, score_masked
from shoestring.fastff.sites import Site, replaced

__all__ = ["Nothing", "causal_loss", "layer_errors", "model_loss", "speeds"]


class Nothing(nn.Module):
    """A feedforward that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the same shape."""
        return torch.zeros_like(x)


@torch.no_grad()
def causal_loss(model: Any, rows: np.ndarray, device: str, size: int = 8) -> float:
    """Nats a token of rows [N, T], each begun without context."""
    total = 0.0
    for start in range(0, len(rows), size):
        ids = torch.from_numpy(rows[start : start + size].astype(np.int64)).to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (len(rows) * (rows.shape[1] - 1))


def model_loss(model: Any, tokenizer: Any, rows: np.ndarray, device: str, masked: bool) -> dict[str, float]:
    """Loss and perplexity of rows [N, T]; of a masked language model, of a quarter of their tokens, hidden."""
    if masked:
        score = score_masked(model, masked_batches(rows, tokenizer, corrupt=False, device=device))[0]
        return {"loss": score.loss, "perplexity": score.perplexity}
    loss = causal_loss(model, rows, device)
    return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}


@torch.no_grad()
def layer_errors(distillation: Any, rows: np.ndarray, device: str, size: int = 8) -> list[float]:
    """Squared error over the target's square of each student on these rows; batches of equal weight."""
    found = [
        distillation.forward(torch.from_numpy(rows[start : start + size].astype(np.int64)).to(device))[
            "errors"
        ]
        for start in range(0, len(rows), size)
    ]
    return [float(value) for value in torch.stack(found).mean(0)]


@torch.no_grad()
def speeds(
    model: Any,
    modules: Mapping[Site, nn.Module],
    rows: np.ndarray,
    device: str,
    *,
    tokens: int,
    masked: bool,
    repetitions: int = 5,
) -> dict[str, dict[str, float]]:
    """Median seconds of one row's forward pass and, of a causal model, of a generated token: before and after, in turns."""
    ids = torch.from_numpy(rows[:1].astype(np.int64)).to(device)
    taken: dict[str, dict[str, list[float]]] = {"before": {}, "after": {}}

    def timed(kinds: dict[str, list[float]], kind: str, count: int) -> None:
        began = time.perf_counter()
        if kind == "row":
            model(input_ids=ids)
        else:
            _generate(model, ids, count)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        kinds.setdefault(kind, []).append((time.perf_counter() - began) / count)

    def once(kinds: dict[str, list[float]]) -> None:
        timed(kinds, "row", 1)
        if not masked:
            timed(kinds, "generated_token", tokens)

    for _ in range(repetitions + 1):  # the first of each warms up
        once(taken["before"])
        with replaced(model, modules):
            once(taken["after"])
    return {
        name: {kind: statistics.median(times[1:]) for kind, times in kinds.items()}
        for name, kinds in taken.items()
    }


def _generate(model: Any, ids: Tensor, tokens: int) -> None:
    """Tokens behind the first of the row, greedily, with a cache."""
    cache, last = None, ids[:, :1]
    for _ in range(tokens):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)

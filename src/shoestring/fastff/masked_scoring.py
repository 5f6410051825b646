"""How well a masked language model fills in a text that it has not seen."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shoestring import hub
from shoestring.errors import ModelFileError, RequestError, first_line
from shoestring.fastff.bert import UltraFastBertForMaskedLM, register
from shoestring.fastff.masking import MaskedRows
from shoestring.fastff.text_source import read_documents
from shoestring.fastff.token_rows import rows_of
from shoestring.hub.quiet import quiet_transformers

__all__ = ["MaskedScore", "evaluate_masked_lm", "load_auto", "masked_batches", "score_masked"]

_SEED = 20231120
_RESAMPLES = 1000


@dataclass(frozen=True)
class MaskedScore:
    """Loss in nats a hidden token with its 95% interval (bootstrap over rows), its exponential, and the share guessed."""

    loss: float
    interval: tuple[float, float]
    perplexity: float
    accuracy: float
    masked_tokens: int
    rows: int


def masked_batches(
    rows: np.ndarray,
    tokenizer: Any,
    *,
    share: float = 0.25,
    corrupt: bool = True,
    device: str = "cpu",
    size: int = 64,
) -> Iterator[dict[str, Tensor]]:
    """The rows in order, hidden always in the same way on the same kind of device."""
    hider = MaskedRows(rows, tokenizer, share=share, corrupt=corrupt, device="cpu", seed=_SEED)
    for start in range(0, len(rows), size):
        batch = hider.collate(range(start, min(start + size, len(rows))))
        yield {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def score_masked(model: Any, batches: Iterator[dict[str, Tensor]]) -> tuple[MaskedScore, np.ndarray]:
    """The score, and (summed loss, tokens) of each row [N, 2]; the model is any HF masked language model in eval mode.

    `forward` is called directly, so a compiled model is not compiled for these shapes, too.
    """
    sums, right = [], 0
    for batch in batches:
        labels, positions = batch["labels"], batch["masked_positions"]
        if isinstance(model, UltraFastBertForMaskedLM):
            logits: Any = model.forward(batch["input_ids"], masked_positions=positions).logits
        else:
            logits = model.forward(input_ids=batch["input_ids"]).logits
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        )
        counts = labels != -100
        right += int((logits.argmax(-1) == labels).sum())
        sums.append(torch.stack([losses.view_as(labels).double().sum(1), counts.sum(1).double()], 1).cpu())
    rows = torch.cat(sums).numpy()
    total, tokens = (float(value) for value in rows.sum(0))
    if not tokens:
        raise RequestError("the text has no token that could be hidden")
    draw = np.random.default_rng(12345)
    picks = [rows[draw.integers(len(rows), size=len(rows))].sum(0) for _ in range(_RESAMPLES)]
    low, high = np.percentile([part[0] / max(part[1], 1) for part in picks], [2.5, 97.5])
    loss = total / tokens
    score = MaskedScore(
        loss, (float(low), float(high)), math.exp(min(loss, 700)), right / tokens, int(tokens), len(rows)
    )
    return score, rows


def evaluate_masked_lm(
    model: str, text: list[str], *, share: float = 0.25, length: int = 128, device: str = "cpu"
) -> MaskedScore:
    """Score any HF masked language model (a run's folder, a model's, a hub id) on text in rows of `length` tokens.

    All hidden tokens are shown as [MASK].

    Raises:
        RequestError: no such model or file, too little text, or a tokenizer without a mask.
    """
    from transformers import AutoModelForMaskedLM

    loaded, tokenizer = load_auto(model, AutoModelForMaskedLM, device)
    if tokenizer.mask_token_id is None:
        raise RequestError(f"{model}: its tokenizer has no mask token")
    end = next((i for i in (tokenizer.sep_token_id, tokenizer.eos_token_id) if i is not None), None)
    if end is None:
        raise RequestError(f"{model}: its tokenizer has no token that ends a document")
    rows = rows_of(read_documents(text), tokenizer, end, length)
    batches = masked_batches(rows, tokenizer, share=share, corrupt=False, device=device)
    return score_masked(loaded, batches)[0]


def load_auto(model: str, kind: Any, device: str, **changes: Any) -> tuple[Any, Any]:
    """A model of this `AutoModel...` kind in fp32 and eval mode with its tokenizer; a run's folder stands for its `final/`.

    Raises:
        RequestError: there is no such folder, or the run is not finished.
        ModelFileError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    register()
    path = Path(model)
    folder = path / "final" if (path / "final" / "config.json").is_file() else path
    if (path / "config.yaml").is_file() and folder == path:
        raise RequestError(f"{model} is a run that is not finished: it has no final/")
    if not (folder / "config.json").is_file():
        folder = hub.resolve(model)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            loaded = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **changes)
        except Exception as error:
            raise ModelFileError(f"{folder} could not be loaded: {first_line(error)}") from error
    return loaded.to(device).eval(), tokenizer

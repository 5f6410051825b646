"""A model's own answers to prompts, in large batches: the text on which embeddings for its own decoding train best."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoestring.errors import RequestError

__all__ = ["generate_answers"]


@torch.inference_mode()
def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_ids: Sequence[int] = (),
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, its end token left out; by transformers' own batched `generate`.

    Prompts of like length share a batch. The tokenizer needs no pad token: padding is masked.

    Raises:
        RequestError: a prompt that leaves no room in the model's context.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise RequestError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's context {limit}"
        )
    ends, device = set(eos_ids), model.get_input_embeddings().weight.device
    pad = min(ends, default=0)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(prompts[index]) for index in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, width - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
                mask[row, width - len(prompts[index]) :] = 1
            output = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                use_cache=True,
                **sampling,
            )
            for index, row_ids in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((at for at, token in enumerate(row_ids) if token in ends), len(row_ids))
                answers[index] = row_ids[:end]
            progress(min(start + batch_size, len(order)), len(order))
    return answers

"""Batches for masked language modelling: which tokens are hidden is a function of the seed, the epoch and the batch.

A fixed number of tokens of each row is predicted (crammed BERT, arXiv 2212.14034, section 4.2), so shapes never change.
"""

import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.training.batches import Plan

__all__ = ["MaskedRows", "mask_tokens"]


def mask_tokens(
    input_ids: Tensor,
    count: int,
    *,
    mask_id: int,
    special: Tensor,
    vocabulary: int,
    generator: torch.Generator,
    corrupt: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hide `count` tokens of each row: corrupted ids [B, T], positions [B, M], labels [B, M].

    Of the hidden tokens 80% become [MASK], 10% a random one, 10% stay (or, without `corrupt`, all become [MASK]). Special
    tokens are never hidden: where a row has too few others, the rest of its labels are -100.
    """
    place = input_ids.device
    draw = torch.rand(input_ids.shape, generator=generator, device=place)
    barred = torch.isin(input_ids, special)
    positions = draw.masked_fill(barred, -1.0).topk(count, dim=1).indices.sort(dim=1).values
    chosen = input_ids.gather(1, positions)
    labels = chosen.masked_fill(barred.gather(1, positions), -100)
    shown = torch.full_like(chosen, mask_id)
    if corrupt:
        fate = torch.rand(chosen.shape, generator=generator, device=place)
        other = torch.randint(vocabulary, chosen.shape, generator=generator, device=place)
        shown = torch.where(fate < 0.8, shown, torch.where(fate < 0.9, other, chosen))
    shown = torch.where(labels == -100, chosen, shown)
    return input_ids.scatter(1, positions, shown), positions, labels


class MaskedRows:
    """Rows of token ids [N, T] (memory-mapped or not), and the batches that `train_model` asks of them.

    An example is a number that holds its row and its epoch's salt; so a row is hidden in another way each epoch, and in
    the same way when a run is resumed.
    """

    def __init__(
        self, rows: np.ndarray, tokenizer: Any, *, share: float, corrupt: bool, device: str, seed: int
    ) -> None:
        self._rows, self._seed, self._corrupt = rows, seed, corrupt
        self._device = torch.device(device)
        self._mask_id, self._vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self._special = torch.tensor(tokenizer.all_special_ids, device=self._device)
        self.masked = max(1, round(share * rows.shape[1]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> int:
        return number

    def plan(self, size: int) -> Plan:
        """Whole batches of `size` shuffled rows; what is left over waits for another epoch."""
        count, size = len(self._rows), min(size, len(self._rows))

        def batches(random: random.Random) -> list[list[int]]:
            salt = random.getrandbits(31)
            order = np.random.default_rng(random.getrandbits(64)).permutation(count)
            whole = order[: count - count % size].reshape(-1, size) + salt * count
            return whole.tolist()

        return batches

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` [B, T], `masked_positions` and `labels` [B, M], on the device."""
        rows = self._rows[np.asarray(numbers) % len(self._rows)].astype(np.int64)
        seed = zlib.crc32(f"{self._seed}/{numbers[0]}/{numbers[-1]}".encode())
        input_ids = torch.from_numpy(rows)
        if self._device.type == "cuda":
            input_ids = input_ids.pin_memory()
        generator = torch.Generator(self._device).manual_seed(seed)
        hidden, positions, labels = mask_tokens(
            input_ids.to(self._device, non_blocking=True),
            self.masked,
            mask_id=self._mask_id,
            special=self._special,
            vocabulary=self._vocabulary,
            generator=generator,
            corrupt=self._corrupt,
        )
        return {"input_ids": hidden, "masked_positions": positions, "labels": labels}

"""Token ids in flat tensors on the device, and batches of about as many tokens each (section 5.1).

A batch is gathered on the device from a list of indices: the host's work per step does not grow with the batch.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoestring.errors import RequestError

__all__ = ["TokenPairs", "padded"]


class TokenPairs:
    """Encoded pairs, with one or several encodings of each (BPE-dropout); example i is its index, see `collate`.

    `variants[v][n]` is the v-th encoding of pair n: (source ids, target ids).
    """

    def __init__(
        self,
        variants: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
        pad: int,
        device: torch.device | str,
    ) -> None:
        self.pairs, self._pad, self._device = len(variants[0]), pad, torch.device(device)
        self.variants = len(variants)
        everything = [pair for variant in variants for pair in variant]
        self._sides = [_Flat([pair[side] for pair in everything], self._device) for side in (0, 1)]
        self.lengths = np.maximum(self._sides[0].host_lengths, self._sides[1].host_lengths)

    def __len__(self) -> int:
        return self.pairs * self.variants

    def __getitem__(self, index: int) -> int:
        return index

    def token_counts(self) -> tuple[int, int]:
        """Source and target tokens of all encodings."""
        return tuple(int(side.host_lengths.sum()) for side in self._sides)  # type: ignore[return-value]

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch as the model takes it, padded on the right; `labels` are -100 where they do not count."""
        chosen = torch.as_tensor(indices)
        if self._device.type == "cuda":
            chosen = chosen.pin_memory()
        chosen = chosen.to(self._device, non_blocking=True)
        source, mask = self._sides[0].gather(chosen, indices, self._pad)
        labels, _ = self._sides[1].gather(chosen, indices, -100)
        return {"input_ids": source, "attention_mask": mask, "labels": labels}

    def plan(self, batch_tokens: int) -> "BucketPlan":
        """Batches of at most `batch_tokens` padded tokens on the longer side.

        Raises:
            RequestError: one pair alone is longer.
        """
        longest = int(self.lengths.max())
        if longest > batch_tokens:
            raise RequestError(
                f"a sentence has {longest} tokens and a batch at most {batch_tokens}: raise batch_tokens or "
                "lower data.max_tokens"
            )
        return BucketPlan(self.lengths.reshape(self.variants, self.pairs), batch_tokens)


class BucketPlan:
    """An epoch: every pair once, in one of its encodings at random, with pairs of similar length in a batch."""

    def __init__(self, lengths: np.ndarray, batch_tokens: int) -> None:
        self._lengths, self._batch_tokens = lengths, batch_tokens

    def __call__(self, random: random.Random) -> list[list[int]]:
        """The batches, in random order."""
        draw = np.random.default_rng(random.getrandbits(64))
        variants, pairs = self._lengths.shape
        chosen = draw.integers(variants, size=pairs) * pairs + np.arange(pairs)
        lengths = self._lengths.ravel()[chosen]
        order = np.argsort(lengths + draw.random(pairs), kind="stable")
        batches, start = [], 0
        for position, length in enumerate(lengths[order]):
            # Sorted by length, so the last of a batch is its longest.
            if (position - start + 1) * length > self._batch_tokens:
                batches.append(chosen[order[start:position]].tolist())
                start = position
        batches.append(chosen[order[start:]].tolist())
        random.shuffle(batches)
        return batches


class _Flat:
    """Sequences of ids end to end, and where each begins."""

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device) -> None:
        self.host_lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        ends = np.cumsum(self.host_lengths)
        flat = np.fromiter((token for sequence in sequences for token in sequence), np.int64, int(ends[-1]))
        self._tokens = torch.from_numpy(flat).to(device)
        self._starts = torch.from_numpy(ends - self.host_lengths).to(device)
        self._lengths = torch.from_numpy(self.host_lengths).to(device)

    def gather(self, chosen: Tensor, indices: Sequence[int], pad: int) -> tuple[Tensor, Tensor]:
        """[B, T] ids with `pad` behind, and the mask of what is not padding."""
        steps = torch.arange(int(self.host_lengths[list(indices)].max()), device=self._tokens.device)
        mask = steps < self._lengths[chosen, None]
        places = (self._starts[chosen, None] + steps).clamp_(max=len(self._tokens) - 1)
        return self._tokens[places].masked_fill_(~mask, pad), mask


def padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Sequences as one tensor [B, T] with `pad` behind, and the mask of what is not padding."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[pad] * (width - len(sequence))] for sequence in sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids.to(device), (torch.arange(width) < lengths[:, None]).to(device)

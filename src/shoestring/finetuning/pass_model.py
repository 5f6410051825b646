"""PaSS training (arXiv 2311.13581): look-ahead rows at many points of a text in one pass, behind a frozen model.

The text's keys and values are computed once and without gradients. Then the rows of all insertions attend to them as
a decoding step's would: row i of an insertion behind position p stands at position p + i, sees the text up to p and
the insertion's rows before it, and is asked for token p + i + 1. Windows, soft caps and sinks are the model's own.
All texts of a batch share their insertion points, so one mask serves them all.
"""

import hashlib
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig, PreTrainedModel

from shoestring.engine import admission
from shoestring.engine.attention import Segment, StepLayout, active_step, additive_mask
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.kvcache import LayerShapeRecorder
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import UnsupportedModelError

__all__ = ["Example", "LookAheadModel", "PassConfig", "collate", "initial_embeddings", "weights_hash"]

Initial = Literal["mean", "tokens", "random"]
Loss = Literal["kl", "cross_entropy"]


@dataclass(frozen=True)
class Example:
    """A text's tokens; insertions begin behind token `start` (the last one of a prompt)."""

    tokens: Sequence[int]
    start: int = 0


def collate(
    examples: Sequence[Example], tokens: int, insertions: int, chance: random.Random
) -> dict[str, Tensor]:
    """A batch: padded `input_ids` [B, T], shared insertion `points` [M], and `labels` [B, M, L], -100 where there is none.

    Padding needs no pad token: nothing that counts attends to it.
    """
    longest = max(len(example.tokens) for example in examples)
    first = min(example.start for example in examples)
    places = range(first, longest - 2)
    points = sorted(chance.sample(places, min(insertions, len(places))))
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), len(points), tokens), -100)
    for row, example in enumerate(examples):
        ids = torch.tensor(list(example.tokens))
        input_ids[row, : len(ids)] = ids
        for column, point in enumerate(points):
            if point >= example.start:
                following = ids[point + 2 : point + 2 + tokens]
                labels[row, column, : len(following)] = following
    return {"input_ids": input_ids, "points": torch.tensor(points), "labels": labels}


def initial_embeddings(model: Any, tokens: int, how: Initial, seed: int = 0) -> Float[Tensor, "L E"]:
    """Embeddings to begin with: the mean token's, random tokens', or random numbers of the tokens' scale."""
    weight = model.get_input_embeddings().weight.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    if how == "mean":
        return weight.mean(0).expand(tokens, -1).clone()
    if how == "tokens":
        return weight[torch.randint(len(weight), (tokens,), generator=generator)].clone()
    return torch.randn(tokens, weight.shape[1], generator=generator) * weight.std()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over all weights, names and types."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class PassConfig(PreTrainedConfig):
    """What a checkpoint says of itself."""

    model_type = "shoestring_pass"

    def __init__(self, tokens: int = 1, hidden_size: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens, self.hidden_size = tokens, hidden_size


class LookAheadModel(PreTrainedModel):
    """The look-ahead embeddings are its only parameters; the frozen model is held beside them.

    Args:
        base: any causal LM that the engine admits; its weights never change, and `close` gives its attention back.
        embeddings: what to begin with, [L, E].
        loss: "kl" to the model's own distributions, or "cross_entropy" on the text.
        decay: the i-th row's loss counts `decay ** (i - 1)`.

    Raises:
        UnsupportedModelError: the engine would not be right on this architecture.
    """

    config_class = PassConfig

    def __init__(
        self, base: Any, embeddings: Float[Tensor, "L E"], loss: Loss = "kl", decay: float = 1.0
    ) -> None:
        super().__init__(PassConfig(*embeddings.shape))
        if getattr(admission.text_config(base), "hidden_size_per_layer_input", 0):
            raise UnsupportedModelError(
                f"{admission.text_config(base).model_type}: its layers look up token ids of their own, "
                "which look-ahead embeddings do not have"
            )
        self.look_ahead = nn.Parameter(embeddings.float())
        base.requires_grad_(False)
        self._held = [HFRunner(base)]  # in a list: the base is no submodule, is not saved and not trained
        self._loss, self._decay = loss, decay
        self._selects_rows = "logits_to_keep" in inspect.signature(base.forward).parameters

    @property
    def base(self) -> Any:
        """The frozen model."""
        return self._held[0].model

    def close(self) -> None:
        """Give the base its own attention back."""
        self._held[0].close()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        points: Int[Tensor, " M"],
        labels: Int[Tensor, "B M L"],
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The loss, summed over the labels that count and divided by `num_items_in_batch`."""
        drafts, teacher = self.predictions(input_ids, points)
        counted = labels != -100
        logits = drafts[counted].float()
        if self._loss == "kl":
            target = teacher[counted].float().log_softmax(-1)
            losses = nn.functional.kl_div(
                logits.log_softmax(-1), target, reduction="none", log_target=True
            ).sum(-1)
        else:
            losses = nn.functional.cross_entropy(logits, labels[counted], reduction="none")
        places = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)[counted]
        total = (losses * self._decay**places).sum()
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / items}

    def predictions(
        self, input_ids: Int[Tensor, "B T"], points: Int[Tensor, " M"]
    ) -> tuple[Float[Tensor, "B M L V"], Float[Tensor, "B M L V"]]:
        """Logits of the look-ahead rows, and the model's own of the text rows that they stand in for."""
        batch, length = input_ids.shape
        tokens, device = len(self.look_ahead), input_ids.device
        offsets = torch.arange(1, tokens + 1, device=device)
        positions = (points[:, None] + offsets).flatten()  # [M L], of the rows and of their teachers
        own = positions.clamp(max=length - 1)
        kept, inverse = torch.unique(own, return_inverse=True)
        past = _Past()
        with torch.no_grad():
            layout = StepLayout.pack({0: TokenTree.chain([0] * length)}, {0: 0}, device)
            teacher = self._run(layout, past, {"input_ids": input_ids}, kept)[:, inverse]
        past.keep()
        visible = torch.zeros(len(positions), length + len(positions), dtype=torch.bool, device=device)
        insertion = torch.arange(len(points), device=device).repeat_interleave(tokens)
        order = offsets.repeat(len(points))
        visible[:, :length] = torch.arange(length, device=device) <= points.repeat_interleave(tokens)[:, None]
        visible[:, length:] = (insertion[:, None] == insertion) & (order[:, None] >= order)
        keys = torch.cat([torch.arange(length, device=device), positions])
        segment = Segment(0, 0, len(positions), 0, length, positions, keys, visible)
        rows = self.look_ahead.to(self.base.dtype).repeat(len(points), 1).expand(batch, -1, -1)
        layout = StepLayout([segment], len(positions), length + len(positions))
        drafts = self._run(layout, past, {"inputs_embeds": rows}, None)
        shape = (batch, len(points), tokens, drafts.shape[-1])
        return drafts.reshape(shape), teacher.reshape(shape)

    def _run(self, layout: StepLayout, past: Any, inputs: dict[str, Tensor], kept: Tensor | None) -> Tensor:
        base: Any = self.base
        arguments: dict[str, Any] = dict(inputs)
        if admission.computes_own_attention(base):
            arguments["attention_mask"] = additive_mask(layout, base.dtype)
        if kept is not None and self._selects_rows:
            arguments["logits_to_keep"] = kept
        # Kernels that take any mask, and its gradients, on every device.
        with active_step(layout), sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            logits: Tensor = base(
                position_ids=layout.positions,
                past_key_values=past,
                use_cache=True,
                return_dict=True,
                **arguments,
            ).logits
        return logits if kept is None or self._selects_rows else logits[:, kept]


class _Past(LayerShapeRecorder):
    """A cache for two passes: the first one's keys and values are kept, the second's come behind them.

    Gradients flow through the second's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept = False

    def keep(self) -> None:
        """The first pass is over."""
        self._kept = True

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the first pass's states; put the second's behind them."""
        if not self._kept:
            self._states[layer_idx] = (key, value)
            return key, value
        past_key, past_value = self._states[layer_idx]
        return torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The first pass's tokens."""
        return self._states[layer_idx][0].shape[2] if self._kept else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys of both passes."""
        return self.get_seq_length(layer_idx) + query_length, 0

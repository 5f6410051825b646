"""Students: new feedforwards that learn to do what a trained model's own ones do, apart from each other or together."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from shoestring.errors import RequestError
from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.sites import Site, find_feedforwards, replaced, seen, student

__all__ = ["Distillation", "Together"]


class StudentConfig(PretrainedConfig):
    """What a checkpoint of the students says of itself."""

    model_type = "shoestring-fff-distillation"


class Distillation(PreTrainedModel):
    """Students as the only parameters, beside a frozen model whose feedforwards they imitate.

    Args:
        teacher: any HF model with feedforwards that `find_feedforwards` knows; it is not changed.
        layers: which of its layers get a student; None: all.
        feedforward: what a student is, `fff-1x11` or `dense-12`.

    Raises:
        RequestError: the model has no such layer.
    """

    config_class = StudentConfig

    def __init__(self, teacher: Any, layers: Sequence[int] | None, feedforward: str) -> None:
        super().__init__(StudentConfig())
        found = {site.layer: site for site in find_feedforwards(teacher)}
        wanted = sorted(found) if layers is None else list(layers)
        if not wanted or set(wanted) - set(found):
            raise RequestError(
                f"layers {sorted(set(wanted) - set(found)) or wanted}: the model has feedforwards in layers "
                f"{min(found)} to {max(found)}"
            )
        self.sites = [found[layer] for layer in wanted]
        self.students = nn.ModuleList([student(site.hidden_size, feedforward) for site in self.sites])
        self._teacher = (teacher.eval().requires_grad_(False),)  # a tuple: its weights are none of ours
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(len(self.sites)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Students come initialised."""

    @torch.no_grad()
    def calibrate(self, input_ids: Tensor) -> None:
        """Measure how large each original's outputs are: students learn them divided by that, whatever the model."""
        with seen(self.teacher, self.sites) as pairs:
            self.teacher(input_ids=input_ids)
        for index, (_, y) in enumerate(pairs):
            self.scales[index] = y.float().square().mean().sqrt().clamp(min=1e-12)

    @property
    def teacher(self) -> Any:
        """The frozen model."""
        return self._teacher[0]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Rows [B, T] -> `errors` [layers], a student's squared error over its target's square; their mean is `loss`.

        With `labels` and `num_items_in_batch` the loss is weighted by the batch's share of the step.
        """
        with torch.no_grad(), seen(self.teacher, self.sites) as pairs:
            self.teacher(input_ids=input_ids)
        errors = []
        for module, scale, (x, y) in zip(self.students, self.scales, pairs, strict=True):
            difference = module(x).float() * scale - y.float()
            errors.append(difference.square().mean() / y.float().square().mean().clamp(min=1e-12))
        stacked = torch.stack(errors)
        loss = stacked.mean()
        if num_items_in_batch is not None and labels is not None:
            loss = loss * labels.numel() / num_items_in_batch
        return {"loss": loss, "errors": stacked.detach()}

    def modules_by_site(self) -> dict[Site, nn.Module]:
        """A copy of each student with its place, as it stands in for the original."""
        found = {}
        for site, module, scale in zip(self.sites, self.students, self.scales, strict=True):
            copied: Any = copy.deepcopy(module).eval()
            out = copied.w_out if isinstance(copied, FastFeedForward) else copied.outer.weight
            with torch.no_grad():
                out.mul_(scale)
            found[site] = copied
        return found


class Together(PreTrainedModel):
    """Students in their places, so that they learn to make up for each other's errors: KL to the unchanged model's choices.

    Args:
        teacher: the frozen model; the students are in it only while `forward` runs.
        modules: the students by their places, as `Distillation.modules_by_site` gives them.
    """

    config_class = StudentConfig

    def __init__(self, teacher: Any, modules: dict[Site, nn.Module]) -> None:
        super().__init__(StudentConfig())
        self.sites = list(modules)
        self.students = nn.ModuleList(modules.values())
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Students come initialised."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Rows [B, T] -> `loss`, the divergence in nats a token, or a token of `masked_positions` [B, M] where given."""

        def choices() -> Tensor:
            logits: Tensor = self._teacher[0](input_ids=input_ids).logits
            if masked_positions is not None:
                logits = logits.gather(1, masked_positions[..., None].expand(-1, -1, logits.shape[-1]))
            return logits.float().flatten(0, 1).log_softmax(-1)

        with torch.no_grad():
            wanted = choices()
        with replaced(self._teacher[0], self.modules_by_site()):
            found = choices()
        loss = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        if num_items_in_batch is not None and labels is not None:
            loss = loss * labels.numel() / num_items_in_batch
        return {"loss": loss}

    def modules_by_site(self) -> dict[Site, nn.Module]:
        """The students with their places."""
        return dict(zip(self.sites, self.students, strict=True))

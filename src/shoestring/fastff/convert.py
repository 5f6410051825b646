"""Replace feedforwards of a trained HF model by fast feedforward layers that were taught to imitate them.

The teacher is the unchanged model: each layer learns from the inputs that its original sees and the outputs that it gives
(mean squared error over the outputs' mean square, Adam), all chosen layers in the same passes over a text.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shoestring.errors import ModelFileError, RequestError, UnsupportedModelError, first_line
from shoestring.fastff.bert_recipe import feedforward_of
from shoestring.fastff.dense import DenseFeedForward
from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.scattered import ScatteredFastFeedForward
from shoestring.hub.quiet import quiet_transformers

__all__ = [
    "Conversion",
    "Distillation",
    "Site",
    "convert_feedforwards",
    "find_feedforwards",
    "load_converted",
    "replaced",
    "save_converted",
    "student",
]

# Attributes by which a feedforward is known: the first takes the input, the last gives the output.
_SIGNS = (
    ("gate_proj", "up_proj", "down_proj"),  # Llama's family
    ("gate_up_proj", "down_proj"),  # Phi-3
    ("c_fc", "c_proj"),  # GPT-2
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
    ("fc_in", "fc_out"),  # GPT-J
    ("fc1", "fc2"),  # Phi
    ("lin1", "lin2"),  # DistilBERT
    ("inner", "outer"),  # our own
)
_RECORD = "fast_feedforward"  # in config.json
_STUDENTS = "fast_feedforward.safetensors"


@dataclass(frozen=True)
class Site:
    """A feedforward of a model: where it begins and ends (the same module, but in BERT), and its width."""

    layer: int
    enter: str
    leave: str
    hidden_size: int


def find_feedforwards(model: nn.Module) -> list[Site]:
    """The feedforwards of a model, a layer each, from the first on.

    Raises:
        UnsupportedModelError: there is none that can be replaced (mixtures of experts are not).
    """
    sites = []
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        if "expert" in name:
            continue
        signs = next((s for s in _SIGNS if all(_takes_vectors(parts.get(sign)) for sign in s)), None)
        if signs is not None and set(parts) <= {
            *signs,
            "act",
            "act_fn",
            "activation",
            "activation_fn",
            "dropout",
        }:
            sites.append(Site(_layer_of(name), name, name, _width(parts[signs[0]])))
        elif {"intermediate", "output", "attention"} <= set(parts):  # BERT: the residual is inside `output`
            inner, outer = (getattr(parts[side], "dense", None) for side in ("intermediate", "output"))
            if isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear):
                size = _width(inner)
                sites.append(Site(_layer_of(name), f"{name}.intermediate", f"{name}.output.dense", size))
    if not sites:
        raise UnsupportedModelError(f"{type(model).__name__} has no feedforward that can be replaced")
    return sites


def student(hidden_size: int, feedforward: str) -> nn.Module:
    """A new layer as `fff-1x11` or `dense-12` says."""
    sizes = feedforward_of(feedforward)
    if sizes["feedforward"] == "dense":
        return DenseFeedForward(hidden_size, sizes["width"])
    return ScatteredFastFeedForward(hidden_size, sizes["depth"], trees=sizes["trees"])


@dataclass(frozen=True)
class Conversion:
    """What `convert_feedforwards` did: the layers, and the students' mean errors over the last tenth of the steps."""

    layers: list[int]
    errors: list[float]
    modules: dict[Site, nn.Module]


def convert_feedforwards(
    model: Any,
    rows: Tensor,
    *,
    layers: Sequence[int] | None = None,
    feedforward: str = "fff-1x11",
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Conversion:
    """Teach students on rows of token ids [N, T] and put them into the model, in place.

    `task: fff-conversion` does the same with checkpoints, held-out measurements and a folder that can be loaded.

    Raises:
        RequestError: no such layer or kind of feedforward, or no rows.
        UnsupportedModelError: no feedforward of the model can be replaced.

    Example:
        >>> convert_feedforwards(model, rows, layers=[3], feedforward="fff-1x7", steps=200).errors
    """
    if rows.dim() != 2 or not len(rows) or steps < 1:
        raise RequestError(
            f"rows of shape {list(rows.shape)} and {steps} steps: rows [N, T] and a step are needed"
        )
    torch.manual_seed(seed)
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    place = next(model.parameters()).device
    distillation: Any = Distillation(model, layers, feedforward)
    distillation.to(place)
    distillation.calibrate(rows[:batch_size].to(place))
    optimizer = torch.optim.Adam(distillation.parameters(), lr=learning_rate)
    draw = torch.Generator().manual_seed(seed)
    last = []
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (batch_size,), generator=draw)].to(place)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        out = distillation(batch)
        out["loss"].backward()
        optimizer.step()
        if step >= steps - max(1, steps // 10):
            last.append(out["errors"])
    modules = distillation.modules_by_site()
    for name, weight in model.named_parameters():
        weight.requires_grad_(wanted[name])
    for site, module in modules.items():
        _put(model, site, module)
    errors = [float(value) for value in torch.stack(last).mean(0)]
    return Conversion([site.layer for site in modules], errors, modules)


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


@contextmanager
def seen(model: nn.Module, sites: Sequence[Site]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of each site's feedforward in the block's forward pass, in the order of `sites`."""
    inputs: dict[Site, Tensor] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    outputs: dict[Site, Tensor] = {}
    hooks = []
    for site in sites:

        def entered(module: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
            inputs[site] = args[0].detach()

        def left(module: nn.Module, args: tuple[Any, ...], output: Tensor, site: Site = site) -> None:
            outputs[site] = output.detach()
            if len(outputs) == len(sites):
                pairs.extend((inputs[place], outputs[place]) for place in sites)

        hooks.append(model.get_submodule(site.enter).register_forward_pre_hook(entered))
        hooks.append(model.get_submodule(site.leave).register_forward_hook(left))
    try:
        yield pairs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced(model: nn.Module, modules: Mapping[Site, nn.Module]) -> Iterator[None]:
    """The model with these in place of its feedforwards, inside the block."""
    before: dict[str, nn.Module] = {}
    try:
        for site, module in modules.items():
            before |= _put(model, site, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def save_converted(
    model: Any, tokenizer: Any, modules: Mapping[Site, nn.Module], feedforward: str, folder: Path
) -> None:
    """Replace the feedforwards for good, and write the model, the new layers in a file of their own."""
    from safetensors.torch import save_file

    for site, module in modules.items():
        _put(model, site, module)
    kinds = {"class": type(model).__name__, "feedforward": feedforward}
    setattr(model.config, _RECORD, {**kinds, "layers": [site.layer for site in modules]})
    rest = {
        name: weight
        for name, weight in model.state_dict().items()
        if not any(_inside(name, site) for site in modules)
    }
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=rest)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    students = {
        f"{site.layer}.{name}": weight.detach().cpu().contiguous()
        for site, module in modules.items()
        for name, weight in module.state_dict().items()
    }
    save_file(students, folder / _STUDENTS)


def load_converted(folder: Path) -> Any:
    """A model that `save_converted` wrote, in fp32 and eval mode.

    Raises:
        ModelFileError: the folder holds no such model, or not all of it.
    """
    import transformers
    from safetensors.torch import load_file

    from shoestring.fastff import bert

    bert.register()
    if not (folder / "config.json").is_file() or not (folder / _STUDENTS).is_file():
        raise ModelFileError(f"{folder} holds no converted model (config.json and {_STUDENTS})")
    with quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        record: Any = getattr(config, _RECORD, None)
        if record is None:
            raise ModelFileError(f"{folder / 'config.json'} does not say which feedforwards were replaced")
        kind = getattr(bert, record["class"], None) or getattr(transformers, record["class"], None)
        if kind is None:
            raise ModelFileError(f"{folder}: this transformers has no {record['class']}")
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    sites = [site for site in find_feedforwards(model) if site.layer in record["layers"]]
    wrong = [name for name in report["missing_keys"] if not any(_inside(name, site) for site in sites)]
    if wrong or report["unexpected_keys"]:
        raise ModelFileError(
            f"{folder}: {sorted([*wrong, *report['unexpected_keys']])[0]!r} is missing or too much"
        )
    students = load_file(folder / _STUDENTS)
    for site in sites:
        module = student(site.hidden_size, record["feedforward"])
        prefix = f"{site.layer}."
        own = {name.removeprefix(prefix): w for name, w in students.items() if name.startswith(prefix)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ModelFileError(f"{folder / _STUDENTS}: {first_line(error)}") from error
        _put(model, site, module)
    return model.eval()


def _inside(name: str, site: Site) -> bool:
    return name.startswith((f"{site.enter}.", f"{site.leave}."))


def _put(model: nn.Module, site: Site, module: nn.Module) -> dict[str, nn.Module]:
    """Set the module in a site's place; return what was there."""
    before = {site.enter: model.get_submodule(site.enter)}
    if site.leave != site.enter:
        before[site.leave] = model.get_submodule(site.leave)
        model.set_submodule(site.leave, nn.Identity())
    model.set_submodule(site.enter, module)
    return before


def _takes_vectors(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0])


def _layer_of(name: str) -> int:
    numbers = re.findall(r"\.(\d+)(?:\.|$)", name)
    return int(numbers[-1]) if numbers else 0

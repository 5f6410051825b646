"""Where the feedforwards of a trained HF model lie, what they see and give, and how another layer is put in their place."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shoestring.errors import UnsupportedModelError
from shoestring.fastff.bert_recipe import feedforward_of
from shoestring.fastff.dense import DenseFeedForward
from shoestring.fastff.scattered import ScatteredFastFeedForward

__all__ = ["Site", "find_feedforwards", "put", "replaced", "seen", "student"]

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
            before |= put(model, site, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def put(model: nn.Module, site: Site, module: nn.Module) -> dict[str, nn.Module]:
    """Set the module in a site's place; return what was there, by name."""
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

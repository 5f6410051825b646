"""Replace feedforwards of a trained HF model by fast feedforward layers that were taught to imitate them.

The teacher is the unchanged model: each layer learns from the inputs that its original sees and the outputs that it gives
(mean squared error over the outputs' mean square, Adam), all chosen layers in the same passes over a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.errors import ModelFileError, RequestError, first_line
from shoestring.fastff.imitation import Distillation
from shoestring.fastff.sites import Site, find_feedforwards, put, student
from shoestring.hub.quiet import quiet_transformers

__all__ = ["Conversion", "convert_feedforwards", "load_converted", "save_converted"]

_RECORD = "fast_feedforward"  # in config.json
_STUDENTS = "fast_feedforward.safetensors"


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
        put(model, site, module)
    errors = [float(value) for value in torch.stack(last).mean(0)]
    return Conversion([site.layer for site in modules], errors, modules)


def save_converted(
    model: Any, tokenizer: Any, modules: Mapping[Site, nn.Module], feedforward: str, folder: Path
) -> None:
    """Replace the feedforwards for good, and write the model, the new layers in a file of their own."""
    from safetensors.torch import save_file

    for site, module in modules.items():
        put(model, site, module)
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
        put(model, site, module)
    return model.eval()


def _inside(name: str, site: Site) -> bool:
    return name.startswith((f"{site.enter}.", f"{site.leave}."))

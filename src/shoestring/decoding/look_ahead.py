"""Look-ahead embeddings (PaSS, arXiv 2311.13581): L input embeddings trained for one model, and the file they lie in.

The file is a safetensors file with one tensor `look_ahead` [L, E]; its metadata holds a manifest as JSON: the base
model, data, recipe and results. Wrong embeddings can never change a text, only cost its speed, so the check against
the model asks for kinship, not for equal bytes: the configuration's sizes must agree, and the largest component of
evenly spaced rows of the token embedding (its landmarks) must lie where it lay. Other precisions, quantised weights
and fine-tuned descendants of the base pass; two unrelated models agree in about one landmark in E.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shoestring.decoding.drafters.rates import Guess
from shoestring.engine.admission import text_config
from shoestring.errors import ModelFileError, RequestError, UnsupportedModelError
from shoestring.hub.catalogue import BUNDLED
from shoestring.hub.source import ModelSource
from shoestring.quantization import quantized_rows

__all__ = ["Base", "LookAhead", "bundled_look_ahead", "load_look_ahead", "read_look_ahead"]

FILE_NAME = "look_ahead.safetensors"
_TENSOR, _MANIFEST, _FORMAT = "look_ahead", "shoestring", 1
_SIZES = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")
_FLOATS = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
_LANDMARKS = 256
_LEAST_AGREEING = 0.75


@dataclass(frozen=True, eq=False)
class LookAhead:
    """L look-ahead embeddings. The i-th one, i tokens behind the last token, is asked for the token after itself.

    Args:
        embeddings: one row a position.
        manifest: `base`, `data`, `recipe`, `results`; what the check and the acceptance rates are read from.
    """

    embeddings: Float[Tensor, "L E"]
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def rows(self) -> list[Float[Tensor, " E"]]:
        """Each of them, the same tensors whenever asked, which cannot change: a runner brings them to its device once."""
        with torch.inference_mode():
            return [row.clone() for row in self.embeddings]

    @property
    def priors(self) -> dict[Guess, float]:
        """How often the candidate of each rank was right at each position, as measured when they were trained."""
        measured = self.manifest.get("results", {}).get("acceptance", [])
        return {
            ("pass", position, rank): float(rate)
            for position, rates in enumerate(measured, 1)
            for rank, rate in enumerate(rates)
        }

    def first(self, tokens: int | None) -> "LookAhead":
        """Only the first `tokens` of them: each sees only those before it, so they predict what they did.

        Raises:
            RequestError: there are fewer.
        """
        if tokens is None or tokens == len(self):
            return self
        if tokens > len(self):
            raise RequestError(f"pass: tokens is {tokens}, and {len(self)} look-ahead embeddings are loaded")
        return replace(self, embeddings=self.embeddings[:tokens])

    def checked(self, base: "Base", name: str) -> "LookAhead":
        """These embeddings, if they belong to the model.

        Raises:
            RequestError: they were trained for another model.
            UnsupportedModelError: the model cannot take input embeddings without token ids.
        """
        if getattr(base.config, "hidden_size_per_layer_input", 0):
            raise UnsupportedModelError(
                f"{name}: its layers look up token ids of their own, which look-ahead embeddings do not have"
            )
        trained = self.manifest.get("base", {})
        for size in _SIZES:
            if trained.get(size) != (own := getattr(base.config, size, None)):
                raise RequestError(
                    f"these look-ahead embeddings were trained for {trained.get('name', 'another model')} "
                    f"({size} {trained.get(size)}); {name} has {own}"
                )
        theirs, ours = trained.get("landmarks", []), base.landmarks()
        agreeing = sum(a == b for a, b in zip(theirs, ours, strict=False))
        if len(theirs) != len(ours) or agreeing < _LEAST_AGREEING * len(ours):
            raise RequestError(
                f"these look-ahead embeddings were trained for {trained.get('name', 'another model')}, whose token "
                f"embedding is another than that of {name} ({agreeing} of {len(ours)} landmarks agree)"
            )
        return self

    def placed(self, device: torch.device, dtype: torch.dtype) -> "LookAhead":
        """These embeddings where and as the model computes."""
        return replace(self, embeddings=self.embeddings.to(device, dtype))

    def save(self, path: Path) -> None:
        """Write the file (atomically)."""
        from safetensors.torch import save_file

        tensor = self.embeddings.detach().float().cpu().contiguous()
        metadata = {_MANIFEST: json.dumps({"format": _FORMAT, **self.manifest})}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file({_TENSOR: tensor}, part, metadata)
        part.replace(path)


@dataclass(frozen=True)
class Base:
    """What a model is recognised by.

    Args:
        config: of its text tower.
        rows: token ids -> their rows of the token embedding, [n, E] in any float type.
    """

    config: Any
    rows: Callable[[list[int]], Tensor]

    @classmethod
    def of_module(cls, model: torch.nn.Module) -> "Base":
        """A transformers module in memory."""
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        return cls(text_config(model), lambda ids: weight.detach()[torch.tensor(ids, device=weight.device)])

    @classmethod
    def of_source(cls, source: ModelSource) -> "Base":
        """A model whose weights lie in files, under the names of the native step: only the rows asked for are read."""
        config, stored = source.config.get_text_config(decoder=True), source.tensors["embed_tokens.weight"]

        def rows(ids: list[int]) -> Tensor:
            if source.quantized:
                return quantized_rows(source, "embed_tokens.weight", config.hidden_size, ids)
            data = np.array(source.maps()["embed_tokens.weight"].reshape(stored.shape[0], -1)[ids])
            if stored.dtype in _FLOATS:
                return torch.from_numpy(data).view(_FLOATS[stored.dtype])
            from gguf import GGMLQuantizationType, quants

            return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[stored.dtype]))

        return cls(config, rows)

    def landmarks(self) -> list[int]:
        """Where the largest component lies in evenly spaced rows of the token embedding."""
        count = int(self.config.vocab_size)
        ids = (
            [index * count // _LANDMARKS for index in range(_LANDMARKS)]
            if count > _LANDMARKS
            else range(count)
        )
        found: list[int] = self.rows(list(ids)).float().abs().argmax(-1).tolist()
        return found

    def describe(self) -> dict[str, Any]:
        """The sizes and landmarks, as a manifest holds them."""
        return {**{size: getattr(self.config, size, None) for size in _SIZES}, "landmarks": self.landmarks()}


def read_look_ahead(path: str | Path) -> LookAhead:
    """Read a file of look-ahead embeddings, or a training run's folder that holds one.

    Raises:
        RequestError: there is no such file.
        ModelFileError: it is not such a file, or its tensor has another shape than [L, E] or is not finite.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise RequestError(f"there is no file of look-ahead embeddings {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            tensor = file.get_tensor(_TENSOR) if _TENSOR in names else None
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is not a safetensors file: {error}") from error
    if tensor is None or _MANIFEST not in metadata:
        found = ", ".join(sorted(names)[:3]) or "nothing"
        raise ModelFileError(f"{path} holds no look-ahead embeddings with a manifest (it holds {found})")
    try:
        manifest = json.loads(metadata[_MANIFEST])
        known = manifest["format"] == _FORMAT and isinstance(manifest["base"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: its manifest cannot be read ({error!r})") from error
    if not known:
        raise ModelFileError(
            f"{path}: its manifest has format {manifest['format']}; this version reads {_FORMAT}"
        )
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ModelFileError(
            f"{path}: its tensor is {list(tensor.shape)}; look-ahead embeddings are [L, hidden size], L at least 1"
        )
    if tensor.shape[1] != manifest["base"].get("hidden_size"):
        raise ModelFileError(
            f"{path}: its embeddings have {tensor.shape[1]} components, "
            f"and its manifest says {manifest['base'].get('hidden_size')}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ModelFileError(f"{path}: its embeddings are not finite numbers")
    return LookAhead(tensor, manifest)


def bundled_look_ahead(name: str) -> LookAhead | None:
    """The embeddings that come with the package for a bundled model, if there are any."""
    if name not in BUNDLED:
        return None
    source = resources.files("shoestring.decoding") / "embeddings" / f"{name}.safetensors"
    with resources.as_file(source) as path:
        return read_look_ahead(path) if path.is_file() else None


def load_look_ahead(look_ahead: str | Path | None, base: Base, name: str) -> LookAhead | None:
    """The embeddings that a user names, checked against the model.

    `look_ahead` is a file, a run folder, a bundled model's name, "none", or None for those that come with the
    package for a bundled model.

    Raises:
        RequestError: no such file, or embeddings of another model.
        ModelFileError: the file is broken.
    """
    if look_ahead == "none":
        return None
    wanted = str(name if look_ahead is None else look_ahead)
    found = bundled_look_ahead(wanted)
    if found is None and look_ahead is not None:
        found = read_look_ahead(look_ahead)
    return None if found is None else found.checked(base, name)

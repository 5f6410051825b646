"""`load`: from a model's name to a `LanguageModel` on the fastest body that is right for it here."""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shoestring import hub
from shoestring.decoding.look_ahead import Base, load_look_ahead
from shoestring.engine.native_loading import module_of_matrices, native_runner_of, weight_shapes
from shoestring.engine.runner import Runner
from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.hub.cache import Progress
from shoestring.model.language_model import LanguageModel
from shoestring.quantization import (
    WeightMatrix,
    check_quantize,
    describe_quantized,
    quantized_matrices,
)

__all__ = ["load"]


def load(
    model: str,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    look_ahead: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a language model.

    Args:
        model: a hub id, a local folder of safetensors, a `.gguf` file, or a bundled name ("smollm2-135m").
        revision: a branch, tag or commit of a hub id.
        adapter: a PEFT adapter's folder or hub id, merged into the weights.
        look_ahead: look-ahead embeddings for PaSS: a file or a training run's folder; None: those that come with a
            bundled model, "none": not even those.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto" is bfloat16 where the hardware computes in it, else float32; a GGUF file's tensors then stay as they
            lie in it, on a CPU that has the native step.
        quantize: "int8" or "int4": weights are rounded once, in groups of 32 inputs, and read so by the native step (CPU,
            kept in the cache) or the fused step (NVIDIA GPUs). A folder of `quantize_model` has been rounded already.
        progress: called with (stage, done, total) while files are fetched, converted or packed, or steps are timed.

    Raises:
        RequestError: an unknown name, device or dtype, or look-ahead embeddings of another model.
        ModelFileError: broken, missing or pickled files.
        DownloadError: the model could not be fetched.
        UnsupportedModelError: the engine would not be right on this architecture.

    Warns:
        RuntimeWarning: a GPU runs transformers' modules, and why its faster step could not be taken.
    """
    check_quantize(quantize)
    hub.check_dtype(dtype)
    wanted = _Loading(
        str(model), revision, adapter, look_ahead, hub.device_of(device), dtype, quantize, progress
    )
    wanted.check_quantized()
    fastest = {"cpu": wanted.native, "cuda": wanted.cuda}.get(wanted.device.type)
    why = f"device {wanted.device} has no step of its own"
    if fastest is not None:
        try:
            return fastest()
        except UnsupportedModelError as error:
            why = str(error)
    if quantize is not None:
        raise UnsupportedModelError(
            f"quantize={quantize!r} needs the native step of a CPU or the fused step of an NVIDIA GPU: {why}"
        )
    if wanted.device.type == "cuda":
        warnings.warn(
            f"{model} runs on transformers' modules, which are slower: {why}", RuntimeWarning, stacklevel=2
        )
    return wanted.over_modules()


@dataclass(frozen=True)
class _Loading:
    """What `load` was asked for, and the bodies that may take it."""

    model: str
    revision: str | None
    adapter: str | None
    look_ahead: str | None
    device: torch.device
    dtype: str
    quantize: str | None
    progress: Progress | None

    @cached_property
    def computed(self) -> torch.dtype:
        """What is computed in."""
        return hub.torch_dtype(self.dtype, self.device)

    @cached_property
    def quantized(self) -> hub.ModelSource | None:
        """The folder of `quantize_model` that was named; None where it is another model."""
        folder = Path(self.model).expanduser()
        if not folder.is_dir() or not hub.is_quantized(folder):
            return None
        return hub.open_source(folder)

    def check_quantized(self) -> None:
        """Refuse what cannot be asked of weights that are rounded already."""
        if self.quantized is None:
            return
        stored = describe_quantized(self.quantized.path)["quantize"]
        if self.quantize not in (None, stored):
            raise RequestError(
                f"{self.model} holds {stored} weights, not {self.quantize}: leave quantize out, or name the model that "
                "they were made from"
            )
        if self.adapter is not None:
            raise RequestError(f"{self.model} holds {stored} weights, which an adapter cannot be merged into")

    @cached_property
    def matrices(self) -> dict[str, WeightMatrix]:
        """The weights of the quantised folder."""
        assert self.quantized is not None, "asked for only of such folders"
        return quantized_matrices(self.quantized.path, weight_shapes(self.quantized))

    @cached_property
    def pretrained(self) -> hub.Pretrained:
        """transformers' module and tokenizer."""
        if self.quantized is not None:
            source = self.quantized
            module: Any = module_of_matrices(source, self.matrices, self.computed, self.device)
            return hub.Pretrained(module, source.tokenizer, source.path, self.model)
        return hub.load_pretrained(
            self.model,
            revision=self.revision,
            adapter=self.adapter,
            dtype=self.dtype,
            device=str(self.device),
            progress=self.progress,
        )

    def over_modules(self) -> LanguageModel:
        """transformers' modules, on any device."""
        return self._made(self.pretrained.model)

    def cuda(self) -> LanguageModel:
        """The fused step of an NVIDIA GPU, over the module's own weights or packed ones."""
        from shoestring.engine.cuda import cuda_runner_of, why_not_here

        reason = why_not_here(self.device)
        if reason is not None:
            raise UnsupportedModelError(reason)
        module = self.pretrained.model
        if self.quantized is not None:
            return self._made_of(module, cuda_runner_of(module, packed=self.matrices))
        runner = cuda_runner_of(module, quantize=self.quantize)
        return self._made(module, runner) if self.quantize is None else self._made_of(module, runner)

    def native(self) -> LanguageModel:
        """The native step over the model's files; over a module in memory where an adapter is merged or names differ."""
        from shoestring.engine.native_runner import NativeRunner, why_not, why_not_built

        if self.computed not in (torch.float32, torch.bfloat16):
            raise UnsupportedModelError(f"the native step has no {self.dtype}")
        reason = why_not_built()
        if reason is not None:
            raise UnsupportedModelError(reason)
        if self.adapter is None:
            source = self.quantized or hub.open_source(
                self.model,
                revision=self.revision,
                dtype=self.dtype,
                quantize=self.quantize,
                progress=self.progress,
            )
            reason = why_not(source.config)
            if reason is not None:
                raise UnsupportedModelError(reason)
            try:
                runner = native_runner_of(
                    source, self.computed, quantize=self.quantize, progress=self.progress
                )
            except UnsupportedModelError:
                pass  # transformers may know how to read these names
            else:
                return LanguageModel(
                    None,
                    source.tokenizer,
                    runner=runner,
                    look_ahead=load_look_ahead(self.look_ahead, Base.of_source(source), self.model),
                    config=source.config,
                    generation_config=source.generation_config,
                    **self._common(),
                )
        module = self.pretrained.model
        return self._made_of(module, NativeRunner.from_module(module, quantize=self.quantize))

    def _made(self, module: Any, runner: Runner | None = None) -> LanguageModel:
        """A language model that keeps the module."""
        found = load_look_ahead(self.look_ahead, Base.of_module(module), self.model)
        return LanguageModel(
            module, self.pretrained.tokenizer, runner=runner, look_ahead=found, **self._common()
        )

    def _made_of(self, module: Any, runner: Runner) -> LanguageModel:
        """A language model that lets the module go: the runner has its own form of the weights."""
        return LanguageModel(
            None,
            self.pretrained.tokenizer,
            runner=runner,
            look_ahead=load_look_ahead(self.look_ahead, Base.of_module(module), self.model),
            config=module.config,
            generation_config=module.generation_config,
            **self._common(),
        )

    def _common(self) -> dict[str, Any]:
        again = replace(self, progress=None)  # holds no module in memory

        def load_module() -> torch.nn.Module:
            return again.pretrained.model

        return {
            "name": self.model,
            "dtype": self.dtype,
            "progress": self.progress,
            "load_module": load_module,
        }

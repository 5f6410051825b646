"""`load`: from a model's name to a `LanguageModel` on the fastest body that is right for it here."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from shoestring import hub
from shoestring.decoding.look_ahead import Base, load_look_ahead
from shoestring.engine.runner import Runner
from shoestring.errors import UnsupportedModelError
from shoestring.hub.cache import Progress
from shoestring.model.language_model import LanguageModel
from shoestring.quantization import check_quantize

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
        quantize: "int8" or "int4": weights are rounded once, in groups of 32 inputs, and read so by the native step (CPU).
        progress: called with (stage, done, total) while files are fetched, converted or packed, or steps are timed.

    Raises:
        RequestError: an unknown name, device or dtype, or look-ahead embeddings of another model.
        ModelFileError: broken, missing or pickled files.
        DownloadError: the model could not be fetched.
        UnsupportedModelError: the engine would not be right on this architecture.
    """
    check_quantize(quantize)
    hub.check_dtype(dtype)
    wanted = _Loading(
        str(model), revision, adapter, look_ahead, hub.device_of(device), dtype, quantize, progress
    )
    why = f"device {wanted.device} is not a CPU"
    if wanted.device.type == "cpu":
        try:
            return wanted.native()
        except UnsupportedModelError as error:
            why = str(error)
    if quantize is not None:
        raise UnsupportedModelError(f"quantize={quantize!r} needs the native step on a CPU: {why}")
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
    def pretrained(self) -> hub.Pretrained:
        """transformers' module and tokenizer."""
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

    def native(self) -> LanguageModel:
        """The native step over the model's files; over a module in memory where an adapter is merged or names differ."""
        from shoestring.engine.native_loading import native_runner_of
        from shoestring.engine.native_runner import NativeRunner, why_not, why_not_built

        if self.computed not in (torch.float32, torch.bfloat16):
            raise UnsupportedModelError(f"the native step has no {self.dtype}")
        reason = why_not_built()
        if reason is not None:
            raise UnsupportedModelError(reason)
        if self.adapter is None:
            source = hub.open_source(
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

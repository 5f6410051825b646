"""A model's name -> a transformers model and tokenizer, ready to run and with nothing missing."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.errors import (
    MissingDependencyError,
    ModelFileError,
    RequestError,
    UnsupportedModelError,
    first_line,
)
from shoestring.hub.cache import Progress
from shoestring.hub.quiet import quiet_transformers
from shoestring.hub.resolving import check_dtype, resolve, resolve_adapter
from shoestring.hub.verify import is_quantized

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Pretrained", "device_of", "load_config", "load_pretrained", "load_tokenizer", "torch_dtype"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


@dataclass(frozen=True)
class Pretrained:
    """A loaded causal language model: in evaluation mode, on its device."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    """None where the folder has no tokenizer."""
    folder: Path
    name: str


def load_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: "str | torch.device" = "cpu",
    progress: Progress | None = None,
) -> Pretrained:
    """Load a model and its tokenizer from a name that `resolve` knows.

    `dtype="auto"` is bfloat16 where the hardware computes in it, else float32. `adapter` is a PEFT adapter
    (a folder or hub id, safetensors only), merged into the weights.

    Raises:
        RequestError: an unknown name, dtype or device.
        DownloadError: the model could not be fetched.
        ModelFileError: a file is broken, tensors are missing, or weights are pickled.
        UnsupportedModelError: transformers has no causal language model of its type.
    """
    check_dtype(dtype)
    place = device_of(device)
    folder = resolve(name, revision=revision, dtype=dtype, progress=progress)
    if is_quantized(folder):
        raise UnsupportedModelError(
            f"{folder} holds int8 or int4 weights, which are run and not trained: name the model that they were made from"
        )
    adapter_folder = resolve_adapter(adapter, progress) if adapter is not None else None
    tokenizer = load_tokenizer(folder)
    model = _load_model(folder, torch_dtype(dtype, place))
    if adapter_folder is not None:
        model = _merge(model, adapter_folder)
    return Pretrained(model.to(place).eval(), tokenizer, folder, str(name))


def load_config(folder: Path) -> Any:
    """The folder's configuration, of a causal language model.

    Raises:
        UnsupportedModelError: transformers has no causal language model of its type.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise UnsupportedModelError(f"{folder / 'config.json'}: {first_line(error)}") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{folder}: transformers has no causal language model of type {config.model_type!r}"
        )
    return config


def _load_model(folder: Path, dtype: "torch.dtype") -> Any:
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except MemoryError:
            raise
        except ImportError as error:
            raise MissingDependencyError(f"{folder}: {first_line(error)}") from error
        except Exception as error:
            raise ModelFileError(f"{folder} could not be loaded: {first_line(error)}") from error
    model, report = loaded
    # transformers fills missing tensors with noise and only logs it
    if missing := sorted(report["missing_keys"]):
        raise ModelFileError(f"{folder} lacks the tensor {missing[0]!r} ({len(missing)} missing in all)")
    return model


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The folder's tokenizer; None where it has none.

    Raises:
        ModelFileError: it is broken.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise ModelFileError(
                f"the tokenizer in {folder} could not be loaded: {first_line(error)}"
            ) from error
    return tokenizer


def _merge(model: Any, folder: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError("adapters need PEFT: pip install 'shoestring[train]'") from error
    with quiet_transformers(), warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            merged = PeftModel.from_pretrained(model, str(folder), local_files_only=True).merge_and_unload()
        except Exception as error:
            raise ModelFileError(f"adapter {folder} does not fit this model: {first_line(error)}") from error
    if any("missing adapter keys" in str(warning.message).lower() for warning in raised):
        raise ModelFileError(f"adapter {folder} lacks tensors that its adapter_config.json asks for")
    return merged


def device_of(device: "str | torch.device") -> "torch.device":
    """The device of a name; "auto" is the first GPU, else the CPU.

    Raises:
        RequestError: an unknown name, or a device that is not here.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    wrong = RequestError(f"unknown device {str(device)!r}: one of auto, cpu, cuda, cuda:N, mps")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise wrong from error
    if place.type not in ("cpu", "cuda", "mps"):
        raise wrong
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {str(device)!r} is not here: {torch.cuda.device_count()} CUDA devices are"
        )
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError("device 'mps' is not here")
    return place


def torch_dtype(dtype: str, device: "torch.device") -> "torch.dtype":
    """The type of a name; "auto" is bfloat16 where the device computes in it, else float32."""
    import torch

    if dtype == "auto":
        return torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _computes_in_bfloat16(device: "torch.device") -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    # mkldnn's own question says yes to plain AVX-512 too, where bfloat16 is emulated and slower
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))

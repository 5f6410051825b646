"""A GGUF file -> a cached folder of safetensors and tokenizer, converted once by transformers' loader."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoestring.errors import MissingDependencyError, ModelFileError, ShoestringError, first_line, suggest
from shoestring.hub.cache import Progress, alone, locked, require_space, subfolder, whole_folder, write_json
from shoestring.hub.gguf_header import GgufHeader, read_gguf_header
from shoestring.hub.gguf_rope import mend_rope
from shoestring.hub.gguf_tokenizer import end_token_ids, save_tokenizer
from shoestring.hub.quiet import quiet_transformers
from shoestring.hub.verify import verify_folder

__all__ = ["CONVERTER_VERSION", "MANIFEST", "convert_gguf", "converted_folder"]

CONVERTER_VERSION = 1
MANIFEST = "shoestring.json"

_BYTES = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
_SPARE = 64 << 20
# None of these is larger than the widest tensor.
_SIZES = (
    "vocab_size",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "expert_count",
)


def converted_folder(stem: str, sha256: str, dtype: str) -> Path:
    """Where the conversion of the file with this hash lies, or will lie."""
    stored = "bfloat16" if dtype == "auto" else dtype
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:60] or "model"
    return subfolder("converted") / f"{readable}-{sha256[:16]}-{stored}-v{CONVERTER_VERSION}"


def convert_gguf(
    stem: str, sha256: str, dtype: str, source: Callable[[], Path], progress: Progress | None = None
) -> Path:
    """Return the converted folder, made first if it is missing or broken; `source` is called only then.

    Raises:
        ModelFileError: the file is broken, or not one transformers converts.
        ShoestringError: the disk has no room for it.
    """
    target = converted_folder(stem, sha256, dtype)
    if _is_whole(target):
        return target
    with locked(target.name):
        if not _is_whole(target):  # another process may have made it while this one waited
            path = source()
            header = read_gguf_header(path)
            if len(header.parts) > 1:
                raise ModelFileError(
                    f"{path} is one part of a split GGUF, which cannot be converted (it runs as it lies, on the CPU with "
                    "dtype auto): join the parts first (llama-gguf-split --merge)"
                )
            _check_sizes(header)
            stored = "bfloat16" if dtype == "auto" else dtype
            needed = header.parameters * _BYTES[stored] + _SPARE
            require_space(target.parent, needed, f"converting {path.name}")
            with whole_folder(target) as part:
                _write(header, part, stored, sha256, progress)
    return target


def _check_sizes(header: GgufHeader) -> None:
    """Refuse sizes that no tensor of the file has: transformers would allocate them first and miss the weights after."""
    widest = max(max(tensor.shape) for tensor in header.tensors.values())
    for name in _SIZES:
        value = header.metadata.get(f"{header.architecture}.{name}", 0)
        for size in value if isinstance(value, list) else [value]:
            if not isinstance(size, int) or not 0 <= size <= widest:
                raise ModelFileError(
                    f"{header.path} is a broken GGUF file: {name} is {size!r}, and its widest tensor has {widest}"
                )
    blocks = header.metadata.get(f"{header.architecture}.block_count", 0)
    if not isinstance(blocks, int) or not 0 <= blocks <= len(header.tensors):
        raise ModelFileError(
            f"{header.path} is a broken GGUF file: block_count is {blocks!r}, with {len(header.tensors)} tensors"
        )


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file() and bool(verify_folder(folder))
    except ModelFileError:
        return False


def _write(header: GgufHeader, part: Path, dtype: str, sha256: str, progress: Progress | None) -> None:
    if progress:
        progress("convert", 0, None)
    try:
        # the loader's own bar obeys no switch, so it draws into the void
        with (
            alone(header.path, part) as link,
            quiet_transformers(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            _save_model(header, link, part, dtype)
            if "tokenizer.ggml.tokens" in header.metadata:
                save_tokenizer(header, link, part)
    except ShoestringError:
        raise
    except Exception as error:
        raise _explain(header, error) from error
    for path in part.rglob("*.safetensors"):
        path.chmod(0o644)  # the writer's own mode shuts out a shared cache's other users
    verify_folder(part)
    source = {"path": str(header.path), "sha256": sha256, "architecture": header.architecture}
    manifest = {"converter_version": CONVERTER_VERSION, "dtype": dtype, "source": source}
    write_json(part / MANIFEST, manifest)
    if progress:
        progress("convert", 1, 1)


def _save_model(header: GgufHeader, link: Path, part: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        link.parent,
        gguf_file=link.name,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        output_loading_info=True,
        **_dense(),
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelFileError(f"{header.path} lacks the tensor for {missing[0]!r}: its weights are incomplete")
    mend_rope(model.config, header)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if ends := end_token_ids(header):
        defaults = model.generation_config or GenerationConfig()
        defaults.eos_token_id = ends[0] if len(ends) == 1 else ends
        model.generation_config = defaults
    model.save_pretrained(part)


def _dense() -> dict[str, Any]:
    """Newer transformers keep the blocks packed unless told; older ones know only dense weights."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _explain(header: GgufHeader, error: Exception) -> ShoestringError:
    text = first_line(error)
    if "accelerate" in text:
        return MissingDependencyError("converting a GGUF file needs accelerate: pip install accelerate")
    if "not supported" in text and "rchitecture" in text:
        known = _architectures()
        name = header.architecture
        return ModelFileError(
            f"{header.path}: transformers cannot convert the GGUF architecture {name!r}{suggest(name, known)}"
        )
    return ModelFileError(f"{header.path} could not be converted: {text}")


def _architectures() -> list[str]:
    try:
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
    except ImportError:
        return []
    return [str(name) for name in GGUF_SUPPORTED_ARCHITECTURES]

"""What transformers leaves out when it reads a GGUF's tokenizer: how `tokenizer.ggml.pre` splits text,
which words skip the merges, and every token that ends a turn.
"""

import logging
from typing import TYPE_CHECKING

from shoestring.hub.gguf_header import GgufHeader

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerBase

__all__ = ["end_token_ids", "implied_settings", "mend_tokenizer"]

_logger = logging.getLogger(__name__)

_LLAMA3 = frozenset(
    {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "smaug-bpe"}
)
_QWEN2 = frozenset({"qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"})
_SINGLE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
_GPT2 = frozenset({"gpt-2", "gpt2", "default", "olmo", "phi-2", "mpt", "jais", "dolma"})

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|return|>",
    "<|endoftext|>", "<|end_of_text|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


def mend_tokenizer(tokenizer: "PreTrainedTokenizerBase", header: GgufHeader) -> None:
    """Make a byte-level tokenizer split text as the model's own does."""
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return  # a sentencepiece vocabulary carries all it needs
    name = str(header.metadata.get("tokenizer.ggml.pre", "default"))
    backend = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 - only fast tokenizers have one
    splitter = _pre_tokenizer(name)
    if splitter is not None:
        backend.pre_tokenizer = splitter
    elif not _transformers_knows(name):
        _logger.warning("%s: pre-tokenizer %r is unknown; text may split differently", header.path, name)
    if name in _LLAMA3 or name == "tekken":
        backend.model.ignore_merges = True


def implied_settings(header: GgufHeader) -> dict[str, bool]:
    """Settings that older files leave unsaid: a Llama 3 text starts with BOS."""
    said = "tokenizer.ggml.add_bos_token" in header.metadata
    is_llama3 = header.metadata.get("tokenizer.ggml.pre") in _LLAMA3
    return {"add_bos_token": True} if is_llama3 and not said else {}


def end_token_ids(header: GgufHeader) -> list[int]:
    """Every id that ends a text or a turn, the file's own EOS first."""
    metadata = header.metadata
    named = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    wanted = set(_TURN_ENDS)
    # An ordinary token that happens to be spelt so is text; control (3) and user-defined (4) ones are not.
    spelt = [
        at
        for at, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (3, 4) and token in wanted
    ]
    return list(dict.fromkeys([*(token_id for token_id in named if token_id is not None), *spelt]))


def _pre_tokenizer(name: str) -> "pre_tokenizers.PreTokenizer | None":
    from tokenizers import Regex, pre_tokenizers

    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _SINGLE_DIGITS:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if name not in _LLAMA3 | _QWEN2:
        return None
    pattern = _WORDS.replace("DIGITS", r"\p{N}{1,3}" if name in _LLAMA3 else r"\p{N}")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), letters])


def _transformers_knows(name: str) -> bool:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping
    except ImportError:
        return False
    return name in getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", ())

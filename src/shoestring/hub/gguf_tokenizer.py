"""A GGUF header -> its tokenizer: byte-level ones made here, others by transformers and kept in the cache.

And what transformers leaves out when it reads a tokenizer from a GGUF: how `tokenizer.ggml.pre` splits text, which words
skip the merges, and every token that ends a turn.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.errors import ModelFileError, first_line
from shoestring.hub.cache import alone, locked, subfolder, whole_folder
from shoestring.hub.gguf_header import GgufHeader
from shoestring.hub.quiet import quiet_transformers

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerBase

__all__ = ["end_token_ids", "implied_settings", "mend_tokenizer", "save_tokenizer", "tokenizer_of_header"]

_CONTROL, _USER_DEFINED = 3, 4
_VERSION = 1  # of the tokenizers kept in the cache

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


def tokenizer_of_header(header: GgufHeader) -> "PreTrainedTokenizerBase | None":
    """The file's tokenizer; None where it has none. The same as a converted folder's.

    Raises:
        ModelFileError: its vocabulary is broken, or of a kind that transformers cannot read.
    """
    if "tokenizer.ggml.tokens" not in header.metadata:
        return None
    if header.metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.merges" in header.metadata:
        try:
            return _byte_level(header)
        except Exception as error:
            raise ModelFileError(
                f"{header.path} is a broken GGUF file: its vocabulary makes no tokenizer ({first_line(error)})"
            ) from error
    return _kept(header)


def save_tokenizer(header: GgufHeader, source: Path, folder: Path) -> None:
    """Write the tokenizer that transformers reads from the file, mended; `source` lies alone in its folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True, **implied_settings(header)
    )
    mend_tokenizer(tokenizer, header)
    length = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(length, int):
        tokenizer.model_max_length = length
    tokenizer.save_pretrained(folder)


def _byte_level(header: GgufHeader) -> "PreTrainedTokenizerBase":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    metadata = header.metadata
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    spelling = bytes_to_unicode()
    alphabet = set(spelling.values())
    # A token outside the byte alphabet (a marker, as a rule) is spelt by its bytes, as the text that it stands for will be.
    spelt = [
        token if set(token) <= alphabet else "".join(spelling[b] for b in token.encode()) for token in tokens
    ]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: at for at, token in enumerate(spelt)}
    bpe = models.BPE(
        vocab=vocabulary,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="",
    )
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    added = list(zip(tokens, types, strict=False))
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in added
            if kind == _CONTROL and set(token) <= alphabet
        ]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in added
            if kind == _USER_DEFINED and token in vocabulary
        ]
    )
    settings: dict[str, Any] = {"model_max_length": metadata.get(f"{header.architecture}.context_length")}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        at = metadata.get(f"tokenizer.ggml.{key}_token_id")
        settings[f"{name}_token"] = None if at is None else tokens[at]
    for name in ("add_bos_token", "add_eos_token"):
        if f"tokenizer.ggml.{name}" in metadata:
            settings[name] = bool(metadata[f"tokenizer.ggml.{name}"])
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **(settings | implied_settings(header)))
    mend_tokenizer(tokenizer, header)
    return tokenizer


def _kept(header: GgufHeader) -> "PreTrainedTokenizerBase":
    """Made by transformers once, by what the file says of it, and then read from the cache."""
    from transformers import AutoTokenizer

    facts = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.")}
    facts["architecture"] = header.architecture
    facts["context_length"] = header.metadata.get(f"{header.architecture}.context_length")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    target = subfolder("tokenizers") / f"{digest[:32]}-v{_VERSION}"
    with quiet_transformers():
        try:
            if not (target / "tokenizer.json").is_file():
                with locked(target.name):
                    if not (target / "tokenizer.json").is_file():
                        with whole_folder(target) as part, alone(header.path, part) as source:
                            save_tokenizer(header, source, part)
            return AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
        except OSError:
            raise
        except Exception as error:
            text = first_line(error)
            raise ModelFileError(f"{header.path}: its tokenizer could not be read: {text}") from error


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

"""The shared vocabulary: byte-level BPE over both languages (section 5.1), as an HF tokenizer.

Bytes are the smallest pieces, so no character is unknown and every text comes back as it was.
"""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from shoestring.errors import RequestError

__all__ = ["BOS", "EOS", "PAD", "encode_all", "train_tokenizer"]

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Learn `vocabulary` pieces from texts of both languages. A sentence is encoded with `</s>` behind it.

    Raises:
        RequestError: fewer pieces than the special tokens and the bytes need.
    """
    least = _BYTES + len((PAD, BOS, EOS))
    if vocabulary < least:
        raise RequestError(
            f"data.vocabulary is {vocabulary}; at least {least} are needed (bytes and special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    eos = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, eos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def encode_all(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], dropout: float | None = None
) -> list[list[int]]:
    """Token ids with `</s>` behind; with `dropout`, merges are left out at random (BPE-dropout, arXiv 1910.13267)."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True  # a text that has </s> in it does not end there
    if dropout:
        assert isinstance(backend.model, models.BPE)
        backend.model.dropout = dropout
    return [encoding.ids for encoding in backend.encode_batch(list(texts))]

"""The masked language model's vocabulary: WordPiece or byte-level BPE, learnt from the corpus, as an HF tokenizer.

A text is encoded with [SEP] behind it, and so is the second of a pair; there is no [CLS], as in crammed BERT's corpus.
"""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from shoestring.errors import RequestError

__all__ = ["MASK", "PAD", "SEP", "UNKNOWN", "learn_pieces"]

PAD, UNKNOWN, SEP, MASK = "[PAD]", "[UNK]", "[SEP]", "[MASK]"
_SPECIAL = [PAD, UNKNOWN, SEP, MASK]
_BYTES = 256


def learn_pieces(
    texts: Iterable[str], vocabulary: int, *, kind: str = "wordpiece", lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """Learn `vocabulary` pieces, special ones included.

    Raises:
        RequestError: too few pieces for the kind.
    """
    least = len(_SPECIAL) + (_BYTES if kind == "bpe" else 1)
    if vocabulary < least:
        raise RequestError(f"data.vocabulary is {vocabulary}; {kind} needs at least {least}")
    trainer: Any
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary, special_tokens=_SPECIAL, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        if lowercase:
            tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=_SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(SEP)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SEP}", pair=f"$A {SEP} $B {SEP}", special_tokens=[(SEP, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        sep_token=SEP,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )

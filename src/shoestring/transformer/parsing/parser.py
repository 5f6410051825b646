"""Sentences to trees with a trained model (section 6.3: a beam of 21, alpha 0.3, up to 300 tokens more than the input)."""

from collections.abc import Callable, Sequence

from shoestring.errors import RequestError
from shoestring.transformer.parsing.trees import Tree, repaired
from shoestring.transformer.search import SearchOptions
from shoestring.transformer.translator import Translator

__all__ = ["PAPER_SEARCH", "parse"]

PAPER_SEARCH = SearchOptions(beam=21, length_penalty=0.3, extra_length=300)


def parse(
    translator: Translator,
    sentences: Sequence[str],
    options: SearchOptions = PAPER_SEARCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tree]:
    """A tree over each sentence's words (split at white space), whatever the model wrote.

    Raises:
        RequestError: a sentence without words.
    """
    for number, sentence in enumerate(sentences, 1):
        if not sentence.strip():
            raise RequestError(f"sentence {number} has no words")
    written = translator.translate(sentences, options, progress).texts
    return [repaired(text, sentence.split()) for text, sentence in zip(written, sentences, strict=True)]

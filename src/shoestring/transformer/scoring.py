"""How good a model is on pairs of texts: BLEU, exact matches, or brackets of the trees it writes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoestring.evaluation.translation import score_translations
from shoestring.transformer.corpus import Pair
from shoestring.transformer.parsing.brackets import bracket_score
from shoestring.transformer.parsing.trees import repaired
from shoestring.transformer.search import SearchOptions
from shoestring.transformer.translator import Translator

__all__ = ["Scored", "score"]


@dataclass(frozen=True)
class Scored:
    """The main numbers, all of them, and what the model wrote."""

    summary: dict[str, float]
    details: dict[str, Any]
    texts: list[str]


def score(translator: Translator, pairs: Sequence[Pair], metric: str, options: SearchOptions) -> Scored:
    """Translate the sources and compare with the targets."""
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    translation = translator.translate(sources, options)
    texts = translation.texts
    if metric == "bleu":
        found = score_translations(texts, targets)
        summary = {"bleu": found.bleu, "bleu_lowercased": found.bleu_lowercased, "chrf": found.chrf}
        details = asdict(found)
    elif metric == "exact":
        right = sum(text == target for text, target in zip(texts, targets, strict=True))
        summary = {"exact": 100 * right / len(pairs)}
        details = {**summary, "sentences": len(pairs)}
    else:
        assert metric == "brackets", metric
        words = [source.split() for source in sources]
        trees = [
            [repaired(text, of) for text, of in zip(side, words, strict=True)] for side in (texts, targets)
        ]
        brackets = bracket_score(*trees)
        summary = {"f1": brackets.f1, "exact": brackets.exact}
        details = asdict(brackets)
    speed = {
        "seconds": round(translation.seconds, 3),
        "sentences_per_second": round(translation.sentences_per_second, 1),
        "tokens_per_second": round(translation.tokens_per_second, 1),
    }
    return Scored({name: round(value, 2) for name, value in summary.items()}, {**details, **speed}, texts)

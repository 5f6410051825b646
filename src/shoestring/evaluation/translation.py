"""Translation quality: sacreBLEU with its signature, chrF, and the paired bootstrap between two systems."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoestring.errors import MissingDependencyError, RequestError

__all__ = ["PairedDifference", "TranslationScore", "paired_bootstrap", "score_translations"]


@dataclass(frozen=True)
class TranslationScore:
    """BLEU (13a tokens) as written and without case, chrF, and their signatures. Intervals are 95%, by bootstrap."""

    bleu: float
    bleu_interval: tuple[float, float]
    bleu_lowercased: float
    chrf: float
    sentences: int
    signatures: dict[str, str]


@dataclass(frozen=True)
class PairedDifference:
    """How much better the second system is, in BLEU, over the same resampled sentences."""

    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    samples: int


def score_translations(
    translations: Sequence[str], references: Sequence[str], samples: int = 1000
) -> TranslationScore:
    """Score one translation and one reference a sentence.

    Raises:
        RequestError: different numbers of them, or none.
        MissingDependencyError: sacrebleu is not installed.
    """
    _check(translations, references)
    bleu, lowercased, chrf = _metric("BLEU"), _metric("BLEU", lowercase=True), _metric("CHRF")
    scores = {name: metric.corpus_score(list(translations), [list(references)]) for name, metric in
              {"bleu": bleu, "bleu_lowercased": lowercased, "chrf": chrf}.items()}  # fmt: skip
    statistics = _statistics(bleu, translations, references)
    draws = _bleu_of(bleu, _resampled(statistics, samples)[0])
    return TranslationScore(
        scores["bleu"].score,
        _interval(draws),
        scores["bleu_lowercased"].score,
        scores["chrf"].score,
        len(translations),
        {
            "bleu": str(bleu.get_signature()),
            "bleu_lowercased": str(lowercased.get_signature()),
            "chrf": str(chrf.get_signature()),
        },
    )


def paired_bootstrap(
    first: Sequence[str], second: Sequence[str], references: Sequence[str], samples: int = 1000
) -> PairedDifference:
    """The difference in BLEU of two systems on the same sentences, with a 95% interval.

    `p_value`: twice the share of resamples in which the difference has the other sign (or is none).

    Raises:
        RequestError: different numbers of sentences.
    """
    _check(first, references)
    _check(second, references)
    bleu = _metric("BLEU")
    statistics = [_statistics(bleu, system, references) for system in (first, second)]
    draws = [_bleu_of(bleu, rows) for rows in _resampled(np.stack(statistics, axis=1), samples, paired=True)]
    whole = [float(_bleu_of(bleu, rows.sum(0, keepdims=True))[0]) for rows in statistics]
    differences = draws[1] - draws[0]
    against = differences <= 0 if whole[1] > whole[0] else differences >= 0
    return PairedDifference(
        whole[0],
        whole[1],
        whole[1] - whole[0],
        _interval(differences),
        min(1.0, 2 * (float(against.sum()) + 1) / (samples + 1)),
        samples,
    )


def _metric(kind: str, **options: Any) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise MissingDependencyError("scores need sacrebleu: pip install 'shoestring[evaluate]'") from error
    return getattr(metrics, kind)(**options)


def _check(translations: Sequence[str], references: Sequence[str]) -> None:
    if not references or len(translations) != len(references):
        raise RequestError(
            f"{len(translations)} translations and {len(references)} references: one of each is needed per sentence"
        )


def _statistics(bleu: Any, translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[sentences, counts]: what sacreBLEU adds up over a corpus."""
    return np.array(bleu._extract_corpus_statistics(list(translations), [list(references)]))


def _resampled(statistics: np.ndarray, samples: int, paired: bool = False) -> list[np.ndarray]:
    """Sums over resampled sentences, [samples, counts] for each system; the seed is fixed."""
    draw = np.random.default_rng(12345)
    systems = statistics if paired else statistics[:, None]
    sums = [systems[draw.integers(len(systems), size=len(systems))].sum(0) for _ in range(samples)]
    return [np.array([total[index] for total in sums]) for index in range(systems.shape[1])]


def _bleu_of(bleu: Any, sums: np.ndarray) -> np.ndarray:
    return np.array([bleu._compute_score_from_stats(row.tolist()).score for row in sums])


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)

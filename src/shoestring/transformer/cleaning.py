"""Which pairs are fit to learn from, and a report of those that are not."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from shoestring.transformer.corpus import Pair

__all__ = ["CleaningReport", "clean"]


@dataclass
class CleaningReport:
    """How many pairs came, why some were left out, how many are kept."""

    pairs: int = 0
    empty: int = 0
    duplicate: int = 0
    in_test: int = 0
    too_long: int = 0
    unequal: int = 0
    kept: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def __str__(self) -> str:
        left_out = [f"{count} {name.replace('_', ' ')}" for name, count in self.as_dict().items() if count]
        return ", ".join(left_out)


def clean(
    pairs: Sequence[Pair],
    held_out: Iterable[str] = (),
    *,
    max_words: int = 250,
    max_ratio: float = 3.0,
) -> tuple[list[Pair], CleaningReport]:
    """The pairs that are whole, new, apart from the held-out sources, short enough and of similar length.

    `max_ratio` bounds the ratio of the sides' lengths in characters (short sides are given 10 more each).
    """
    report = CleaningReport(pairs=len(pairs))
    tests = {_key(text) for text in held_out}
    seen: set[Pair] = set()
    kept = []
    for source, target in pairs:
        ratio = (len(source) + 10) / (len(target) + 10)
        if not source or not target:
            report.empty += 1
        elif (source, target) in seen:
            report.duplicate += 1
        elif _key(source) in tests:
            report.in_test += 1
        elif max(len(source.split()), len(target.split())) > max_words:
            report.too_long += 1
        elif max(ratio, 1 / ratio) > max_ratio:
            report.unequal += 1
        else:
            seen.add((source, target))
            kept.append((source, target))
    report.kept = len(kept)
    return kept, report


def _key(text: str) -> str:
    """A text without case, white space and punctuation, so that a near copy of a test sentence is found."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())

"""Decoding strategies side by side on the same prompts: tokens/step, tokens/s, and equality with plain decoding."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shoestring.decoding.settings import as_decoding, describe
from shoestring.evaluation.parting import Parting, find_parting
from shoestring.generation import Generation, Piece, Prompt
from shoestring.model import LanguageModel

__all__ = ["PLAIN", "Comparison", "StrategySummary", "compare"]

PLAIN = "autoregressive"


@dataclass(frozen=True)
class StrategySummary:
    """One strategy over all prompts. `ratio` is its tokens/s over plain decoding's, the median over prompts."""

    decoding: str
    tokens_per_step: float
    tokens_per_second: float
    ratio: float
    texts: int
    equal: int
    partings: Mapping[int, Parting]
    note: str | None

    @property
    def verdict(self) -> str:
        """`equal`, or where the first text parts from plain decoding's and how near the two tokens were."""
        if not self.partings:
            return "equal"
        prompt, parting = next(iter(self.partings.items()))
        gap = "one text is longer" if parting.gap is None else f"gap {parting.gap:.2g}"
        gap = "a tie" if parting.gap == 0 else gap
        many = f"{self.equal} of {self.texts} equal, prompt {prompt + 1} " if self.texts > 1 else ""
        return f"{many}parts at token {parting.at}, {gap}"


@dataclass
class Comparison:
    """Every strategy's texts, by prompt. `decodings[0]` is plain decoding."""

    decodings: list[str]
    generations: dict[str, list[Generation]] = field(default_factory=dict)
    partings: dict[str, dict[int, Parting]] = field(default_factory=dict)

    def add(self, generation: Generation, parting: Parting | None) -> None:
        """Add a strategy's text of the next prompt."""
        done = self.generations.setdefault(generation.decoding, [])
        if parting is not None:
            self.partings.setdefault(generation.decoding, {})[len(done)] = parting
        done.append(generation)

    def summaries(self) -> list[StrategySummary]:
        """One row a strategy, plain decoding first."""
        return [self._summary(decoding) for decoding in self.decodings if decoding in self.generations]

    def _summary(self, decoding: str) -> StrategySummary:
        own, plain = self.generations[decoding], self.generations[self.decodings[0]]
        partings = self.partings.get(decoding, {})
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(own, plain, strict=False)]
        return StrategySummary(
            decoding,
            sum(len(g.token_ids) for g in own) / sum(g.steps for g in own),
            sum(len(g.token_ids) for g in own) / sum(g.seconds for g in own),
            statistics.median(ratios),
            len(own),
            len(own) - len(partings),
            partings,
            next((g.note for g in own if g.note), None),
        )

    def as_json(self) -> list[dict[str, Any]]:
        """The summaries as plain data."""
        rows = []
        for summary in self.summaries():
            row = asdict(summary)
            row["partings"] = [
                {"prompt": prompt, **asdict(parting)} for prompt, parting in summary.partings.items()
            ]
            rows.append({**row, "verdict": summary.verdict})
        return rows


def compare(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    decodings: Sequence[str],
    on_piece: Callable[[int, str, Piece], None] = lambda *_: None,
    **options: Any,
) -> Comparison:
    """Run every strategy on every prompt in turn.

    Plain decoding comes first, asked for or not. Nothing cached by one strategy helps the next. Options as for
    `LanguageModel.stream`; `on_piece(prompt, decoding, piece)` sees the texts as they come.
    """
    names = list(dict.fromkeys([PLAIN, *(describe(as_decoding(decoding)) for decoding in decodings)]))
    comparison = Comparison(names)
    ids = [model.encode(prompt) for prompt in prompts]
    for name in names:  # warm up, and time the machine where a strategy needs it, before anything counts
        model.generate(ids[0][-16:], decoding=name, max_new_tokens=4)
    for index, prompt in enumerate(ids):
        for name in names:
            model.forget()
            generation = None
            for piece in model.stream(prompt, decoding=name, **options):
                on_piece(index, name, piece)
                generation = piece.generation
            assert generation is not None, "a stream ends with its generation"
            plain = comparison.generations.get(PLAIN, [])
            parting = None
            if name != PLAIN:
                parting = find_parting(
                    model.runner, prompt, plain[index].token_ids, generation.token_ids, model.dtype
                )
            comparison.add(generation, parting)
    return comparison

"""Decoding strategies side by side on the same prompts: tokens/step, tokens/s, and equality with plain decoding."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shoestring.decoding.settings import as_decoding, describe
from shoestring.errors import RequestError
from shoestring.evaluation.parting import Parting, find_parting
from shoestring.generation import Generation, Piece, Prompt
from shoestring.model import LanguageModel

__all__ = ["PLAIN", "Comparison", "StrategySummary", "compare"]

PLAIN = "autoregressive"


@dataclass(frozen=True)
class StrategySummary:
    """One strategy over all prompts.

    `tokens_per_step` is a sequence's own; `tokens_per_second` is of all that are decoded at once. `ratio` is tokens/s over
    plain decoding's at the same batch, the median over batches.
    """

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
    """Every strategy's texts, by prompt. `decodings[0]` is plain decoding; `batch` prompts are decoded at once."""

    decodings: list[str]
    batch: int = 1
    generations: dict[str, list[Generation]] = field(default_factory=dict)
    partings: dict[str, dict[int, Parting]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By strategy, how long each batch took."""

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
        took, plain_took = self.seconds[decoding], self.seconds[self.decodings[0]]
        ratios = []
        for index, (ours, theirs) in enumerate(zip(took, plain_took, strict=False)):
            part = slice(index * self.batch, (index + 1) * self.batch)
            tokens, plain_tokens = (sum(len(g.token_ids) for g in every[part]) for every in (own, plain))
            ratios.append(tokens / ours / (plain_tokens / theirs))
        return StrategySummary(
            decoding,
            sum(len(g.token_ids) for g in own) / sum(g.steps for g in own),
            sum(len(g.token_ids) for g in own) / sum(took),
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
    *,
    batch: int = 1,
    **options: Any,
) -> Comparison:
    """Run every strategy on every prompt in turn, or on `batch` prompts at once.

    Plain decoding comes first, asked for or not. Nothing cached by one strategy helps the next. Options as for
    `LanguageModel.stream`; `on_piece(prompt, decoding, piece)` sees the texts as they come, those of a batch prompt by
    prompt when all strategies are done with it.

    Raises:
        RequestError: a batch below 1, or larger than the model decodes at once.
    """
    if not 1 <= batch <= model.slots:
        raise RequestError(
            f"batch {batch} is not within 1 and {model.slots}, the most that this model decodes at once"
        )
    names = list(dict.fromkeys([PLAIN, *(describe(as_decoding(decoding)) for decoding in decodings)]))
    comparison = Comparison(names, batch)
    ids = [model.encode(prompt) for prompt in prompts]
    for name in names:  # warm up, and time the machine where a strategy needs it, before anything counts
        model.generate([tokens[-16:] for tokens in ids[:batch]], decoding=name, max_new_tokens=4)
    for start in range(0, len(ids), batch):
        group = ids[start : start + batch]
        kept: list[tuple[str, Piece]] = []
        for name in names:
            model.forget()
            ends: dict[int, Generation] = {}
            began = time.perf_counter()
            for piece in model.stream(group, decoding=name, **options):
                if batch == 1:
                    on_piece(start, name, piece)
                else:
                    kept.append((name, piece))
                if piece.generation is not None:
                    ends[piece.index] = piece.generation
            elapsed = time.perf_counter() - began
            # Alone, a text's own time, which showing it is no part of.
            comparison.seconds.setdefault(name, []).append(ends[0].seconds if batch == 1 else elapsed)
            for index, prompt in enumerate(group):
                parting = None
                if name != PLAIN:
                    plain = comparison.generations[PLAIN][start + index].token_ids
                    parting = find_parting(model.runner, prompt, plain, ends[index].token_ids, model.dtype)
                comparison.add(ends[index], parting)
        for name, piece in sorted(
            kept, key=lambda one: one[1].index
        ):  # stable: strategies and tokens keep their order
            on_piece(start + piece.index, name, piece)
    return comparison

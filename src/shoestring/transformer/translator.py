"""A trained model and its tokenizer: texts in, translations out, batched by length."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from shoestring.errors import ModelFileError, RequestError, first_line
from shoestring.hub.quiet import quiet_transformers
from shoestring.transformer.batching import padded
from shoestring.transformer.config import TransformerConfig
from shoestring.transformer.model import Transformer
from shoestring.transformer.search import Hypothesis, SearchOptions, search
from shoestring.transformer.tokenizer import encode_all

__all__ = ["Translation", "Translator"]

_BATCH_TOKENS = 8192  # padded source tokens times hypotheses


@dataclass(frozen=True)
class Translation:
    """Texts in the order of their sources, and what they took."""

    texts: list[str]
    scores: list[float]
    tokens: int
    seconds: float

    @property
    def sentences_per_second(self) -> float:
        """Sources translated in a second."""
        return len(self.texts) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens written in a second, ends included."""
        return self.tokens / self.seconds


class Translator:
    """`Translator.load(folder).translate(["A dog runs."])`."""

    def __init__(self, model: Transformer, tokenizer: PreTrainedTokenizerFast) -> None:
        if len(tokenizer) != model.config.vocab_size:
            raise ModelFileError(
                f"the tokenizer has {len(tokenizer)} pieces and the model {model.config.vocab_size}: "
                "they are not of the same run"
            )
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, path: Path | str, device: str = "auto", dtype: torch.dtype | None = None) -> "Translator":
        """Load what `save` or a training run wrote: a model's folder, or a run's (its `final` is taken).

        Raises:
            ModelFileError: it is not such a folder, or its parts do not belong together.
        """
        folder = Path(path)
        if (folder / "final" / "config.json").is_file():
            folder = folder / "final"
        if not (folder / "config.json").is_file():
            raise ModelFileError(
                f"{path} is no trained Transformer: it has no config.json, nor final/config.json"
            )
        try:
            config = TransformerConfig.from_pretrained(folder)
            if config.model_type != TransformerConfig.model_type:
                raise ModelFileError(
                    f"{path} is a {config.model_type} model; translate takes those of this project"
                )
            with quiet_transformers():
                model = Transformer.from_pretrained(folder, config=config, dtype=dtype or torch.float32)
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelFileError(f"{path} cannot be loaded: {first_line(error)}") from error
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)  # type: ignore[arg-type]
        return cls(model.eval(), tokenizer)

    def save(self, path: Path) -> None:
        """Write the model and the tokenizer into one folder."""
        with quiet_transformers():
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)

    def translate(
        self,
        texts: Sequence[str],
        options: SearchOptions | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        batch_tokens: int = _BATCH_TOKENS,
    ) -> Translation:
        """Translate; an empty text gives an empty one. `progress(done, total)` is called as batches come out.

        Raises:
            RequestError: a text has more tokens than the model has positions.
        """
        began = time.perf_counter()
        found: list[Hypothesis] = [Hypothesis([], 0.0)] * len(texts)
        done = sum(not text.strip() for text in texts)
        for indices, hypotheses in self.search(texts, options or SearchOptions(), batch_tokens=batch_tokens):
            for index, best in zip(indices, hypotheses, strict=True):
                found[index] = best[0]
            done += len(indices)
            progress(done, len(texts))
        written = [hypothesis.tokens for hypothesis in found]
        outputs = self.tokenizer.backend_tokenizer.decode_batch(written, skip_special_tokens=True)
        return Translation(
            [output.strip() for output in outputs],
            [hypothesis.score for hypothesis in found],
            sum(len(tokens) + 1 for tokens in written if tokens),
            time.perf_counter() - began,
        )

    def search(
        self,
        texts: Sequence[str],
        options: SearchOptions,
        best: int = 1,
        batch_tokens: int = _BATCH_TOKENS,
    ) -> Iterator[tuple[list[int], list[list[Hypothesis]]]]:
        """Batches of texts of similar length, longest first: (which texts, their `best` hypotheses)."""
        encoded = self.encode(texts)
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(encoded[i]))
        start = 0
        while start < len(order):
            rows = max(1, batch_tokens // (len(encoded[order[start]]) * options.beam))
            indices = order[start : start + rows]
            ids, mask = padded(
                [encoded[i] for i in indices], self.model.config.pad_token_id, self.model.device
            )
            whole = len(encoded[indices[0]]) == len(encoded[indices[-1]])
            yield indices, search(self.model, ids, None if whole else mask, options, best)
            start += rows

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, each with the end behind.

        Raises:
            RequestError: a text has more tokens than the model has positions.
        """
        encoded = encode_all(self.tokenizer, texts)
        most = self.model.config.max_positions
        for number, ids in enumerate(encoded, 1):
            if len(ids) > most:
                raise RequestError(
                    f"text {number} has {len(ids)} tokens and the model {most} positions; split it into sentences"
                )
        return encoded

    def attention(self, source: str, target: str | None = None) -> dict[str, Any]:
        """Attention weights of a sentence pair (by default with its own translation), and the tokens of each side.

        `encoder`, `decoder`, `cross`: a tensor [L, H, T, S] each.
        """
        if target is None:
            target = self.translate([source]).texts[0]
        ids, labels = (torch.tensor([ids], device=self.model.device) for ids in self.encode([source, target]))
        with torch.no_grad():
            out = self.model(ids, labels=labels, output_attentions=True)
        names = [[self._shown(token) for token in side] for side in (ids[0].tolist(), labels[0].tolist())]
        return {
            "source": names[0],
            "target": names[1],
            "read": ["<s>", *names[1][:-1]],
            "encoder": torch.cat(out.encoder_attentions),
            "decoder": torch.cat(out.decoder_attentions),
            "cross": torch.cat(out.cross_attentions),
        }

    def _shown(self, token: int) -> str:
        return str(self.tokenizer.decode([token])).strip() or str(self.tokenizer.convert_ids_to_tokens(token))

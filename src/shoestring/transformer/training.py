"""A Transformer run from its recipe: corpora, vocabulary, batches, training, averaging, scores of the test sets."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from shoestring.errors import RequestError
from shoestring.training.averaging import averaged_weights
from shoestring.training.folder import RunFolder
from shoestring.training.task import Observer, Progress, Task, silent
from shoestring.training.trainer import resolved_device, train_model
from shoestring.transformer.batching import TokenPairs
from shoestring.transformer.cleaning import clean
from shoestring.transformer.corpus import Pair, read_corpus
from shoestring.transformer.model import Transformer
from shoestring.transformer.recipe import TransformerRecipe
from shoestring.transformer.scoring import score
from shoestring.transformer.search import SearchOptions
from shoestring.transformer.tokenizer import encode_all, train_tokenizer
from shoestring.transformer.translator import Translator

__all__ = ["TASK", "train"]

_GREEDY = SearchOptions(beam=1)
_VALIDATED = 1000  # sentences of the validation set that are translated, greedily


def train(recipe: TransformerRecipe, folder: RunFolder, observer: Observer = silent) -> dict[str, Any]:
    """Train (or go on), average the last checkpoints, translate the test sets, write `final/` and `result.json`.

    Raises:
        RequestError: a corpus that cannot be read, or from which nothing is left.
    """
    device = resolved_device(recipe.device)
    pairs, cleaning, validation, tests = _corpora(recipe)
    observer(Progress("cleaning", 0, 0, cleaning))
    tokenizer = _tokenizer(recipe, folder, pairs)
    examples, dropped = _encoded(recipe, tokenizer, pairs, device)
    set_seed(recipe.seed)
    model = Transformer(recipe.model.config(len(tokenizer), recipe.label_smoothing))
    sources, targets = examples.token_counts()
    about = {
        "parameters": model.num_parameters(),
        "pairs": examples.pairs,
        "tokens": [sources // examples.variants, targets // examples.variants],
        "cleaning": {**cleaning, "too_many_tokens": dropped},
    }
    observer(Progress("data", 0, 0, {name: about[name] for name in ("parameters", "pairs", "tokens")}))

    def evaluate(current: PreTrainedModel) -> dict[str, float]:
        assert isinstance(current, Transformer)
        values = _loss(current, _encoded(recipe, tokenizer, validation, device, dropout=False)[0], recipe)
        values |= score(
            Translator(current, tokenizer), validation[:_VALIDATED], recipe.metric, _GREEDY
        ).summary
        return values

    train_model(
        model,
        examples,
        examples.collate,
        examples.plan(recipe.batch_tokens),
        recipe,
        folder,
        tokenizer=tokenizer,
        evaluate=evaluate if validation else None,
        observer=observer,
        peak_learning_rate=recipe.peak_learning_rate(model.config.d_model),
        epsilon=1e-9,
    )
    if not folder.writes:
        return {}
    result = {
        **about,
        "training_seconds": folder.training_seconds(),
        **_finish(recipe, folder, model, tokenizer, tests, observer),
    }
    folder.finish(result)
    return result


TASK = Task(TransformerRecipe, train)


def _corpora(
    recipe: TransformerRecipe,
) -> tuple[list[Pair], dict[str, int], list[Pair], dict[str, list[Pair]]]:
    data = recipe.data
    pairs = [pair for name in data.train for pair in read_corpus(name, data.languages)]
    validation = read_corpus(data.validation, data.languages) if data.validation else []
    tests = {title: read_corpus(name, data.languages) for title, name in data.test.items()}
    held_out = [source for held in (validation, *tests.values()) for source, _ in held]
    kept, report = clean(pairs, held_out, max_ratio=data.max_ratio)
    if not kept:
        raise RequestError(f"of {report.pairs} pairs none is left after cleaning ({report})")
    return kept, report.as_dict(), [pair for pair in validation if all(pair)], tests


def _tokenizer(
    recipe: TransformerRecipe, folder: RunFolder, pairs: Sequence[Pair]
) -> PreTrainedTokenizerFast:
    """The run's own, if it has one already: a resumed run must not learn another."""
    kept = folder.path / "tokenizer"
    if not (kept / "tokenizer.json").is_file():
        tokenizer = train_tokenizer((text for pair in pairs for text in pair), recipe.data.vocabulary)
        if not folder.writes:
            return tokenizer
        part = folder.path / "tokenizer.part"
        tokenizer.save_pretrained(part)
        part.replace(kept)
    return PreTrainedTokenizerFast.from_pretrained(kept)


def _encoded(
    recipe: TransformerRecipe,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    device: str,
    dropout: bool = True,
) -> tuple[TokenPairs, int]:
    """The pairs as tokens (the first variant without BPE-dropout), and how many were too long."""
    data = recipe.data
    texts = [text for pair in pairs for text in pair]
    variants = []
    for number in range(data.bpe_variants if dropout and data.bpe_dropout else 1):
        ids = encode_all(tokenizer, texts, data.bpe_dropout if number else None)
        variants.append(list(zip(ids[::2], ids[1::2], strict=True)))
    fits = [
        n for n in range(len(pairs)) if all(len(ids) <= data.max_tokens for v in variants for ids in v[n])
    ]
    if not fits:
        raise RequestError(f"every pair has more than data.max_tokens = {data.max_tokens} tokens")
    kept = [[variant[n] for n in fits] for variant in variants]
    return TokenPairs(kept, tokenizer.pad_token_id, device), len(pairs) - len(fits)


def _loss(model: Transformer, pairs: TokenPairs, recipe: TransformerRecipe) -> dict[str, float]:
    """The validation set's loss per token, label smoothing included as in training."""
    import random

    total = count = 0.0
    for indices in pairs.plan(recipe.batch_tokens)(random.Random(0)):
        batch: dict[str, Any] = pairs.collate(indices)
        tokens = int((batch["labels"] != -100).sum())
        found: Any = model.forward(**batch)  # not compiled for these shapes, too
        total += float(found.loss) * tokens
        count += tokens
    return {"loss": total / count}


def _finish(
    recipe: TransformerRecipe,
    folder: RunFolder,
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    tests: dict[str, list[Pair]],
    observer: Observer,
) -> dict[str, Any]:
    """Scores of the last and the averaged weights, greedy and by beam; the averaged ones are kept."""
    model.eval()
    search = recipe.search
    beam = SearchOptions(search.beam, search.length_penalty, search.extra_length)
    scores: dict[str, Any] = {}
    checkpoints = folder.checkpoints()[-recipe.average :]
    for weights in ("last", "averaged"):
        if weights == "averaged":
            model.load_state_dict(averaged_weights(checkpoints), strict=False)
            Translator(model, tokenizer).save(folder.path / "final")
        for title, pairs in tests.items():
            for way, options in (("greedy", _GREEDY), ("beam", beam)):
                scored = score(Translator(model, tokenizer), pairs, recipe.metric, options)
                scores.setdefault(title, {})[f"{weights}, {way}"] = scored.details
                observer(Progress(f"{title}, {weights}, {way}", 0, 0, scored.summary))
                _write_translations(folder.path / f"{title}.{weights}.{way}.txt", scored.texts)
    return {"averaged": [path.name for path in checkpoints], "search": asdict(beam), "scores": scores}


def _write_translations(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts), encoding="utf-8")

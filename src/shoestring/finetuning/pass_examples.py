"""What look-ahead embeddings train on: texts cut to length, and the model's own answers, written down once per run."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.errors import RequestError
from shoestring.finetuning.own_answers import generate_answers
from shoestring.finetuning.pass_model import Example
from shoestring.finetuning.pass_recipe import PassRecipe
from shoestring.finetuning.texts import read_texts
from shoestring.model.templates import encode_messages, has_template

__all__ = ["examples_of", "length_batches"]

Report = Callable[[int, int], None]


def examples_of(
    recipe: PassRecipe, model: Any, tokenizer: Any, answers_file: Path, report: Report
) -> tuple[list[Example], list[Example]]:
    """Training examples and held-out ones, a function of recipe and model. Answers are read back if they are there.

    Raises:
        RequestError: no data, no tokenizer, or no text long enough for a single insertion.
    """
    data = recipe.data
    if not data.texts and not data.prompts:
        raise RequestError("data has neither texts nor prompts; name at least one source")
    if tokenizer is None:
        raise RequestError(f"{recipe.model} has no tokenizer, which its training texts need")
    most, chance = _most_tokens(recipe, model), random.Random(recipe.seed)
    texts = [text for source in data.texts for text in read_texts(source)]
    prompts = [prompt for source in data.prompts for prompt in read_texts(source)]
    examples = [
        Example(ids[start : start + most])
        for text in texts
        if (ids := list(tokenizer(text)["input_ids"]))
        for start in range(0, len(ids), most)
    ]
    chance.shuffle(examples)
    chance.shuffle(prompts)
    if prompts:
        answered = _answered(recipe, model, tokenizer, prompts, most, answers_file, report)
        held_out, examples = answered[: data.held_out], [*examples, *answered[data.held_out :]]
    else:
        held_out, examples = examples[: data.held_out], examples[data.held_out :]
    needed = recipe.tokens + 2  # a token to stand behind, the next one, and those to foresee
    longest = max((len(e.tokens) - e.start for e in [*examples, *held_out]), default=0)
    train, test = ([e for e in group if len(e.tokens) - e.start >= needed] for group in (examples, held_out))
    if not train or not test:
        which = "training" if not train else "held-out"
        raise RequestError(
            f"no {which} text is long enough: {recipe.tokens} look-ahead tokens need {needed} tokens, the longest of "
            f"{len(examples)} training and {len(held_out)} held-out texts has {longest}"
        )
    return train, test


def length_batches(examples: list[Example], size: int) -> Callable[[random.Random], list[list[int]]]:
    """A plan whose batches hold texts of like length, in random order."""

    def plan(random: random.Random) -> list[list[int]]:
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens) // 16, random.random()))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        random.shuffle(batches)
        return batches

    return plan


def _most_tokens(recipe: PassRecipe, model: Any) -> int:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    most = recipe.data.max_tokens
    return most if limit is None else min(most, int(limit) - recipe.tokens)


def _answered(
    recipe: PassRecipe,
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    most: int,
    file: Path,
    report: Report,
) -> list[Example]:
    """Prompts with the model's answers: the held-out ones and a share of the others greedily."""
    settings = recipe.answers
    ids = [_prompt_ids(tokenizer, prompt)[: max(1, most // 2)] for prompt in prompts]
    if file.is_file():
        answers = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        greedy = recipe.data.held_out + round(settings.greedy_share * max(0, len(ids) - recipe.data.held_out))
        answers, done = [], 0
        for part, temperature in ((ids[:greedy], 0.0), (ids[greedy:], settings.temperature)):
            answers += generate_answers(
                model,
                part,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                eos_ids=_eos_ids(model, tokenizer),
                batch_size=settings.batch_size,
                seed=recipe.seed,
                progress=lambda count, _, before=done: report(before + count, len(ids)),  # type: ignore[misc]
            )
            done += len(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        unfinished.replace(file)
    return [
        Example([*prompt, *answer][:most], len(prompt) - 1)
        for prompt, answer in zip(ids, answers, strict=True)
    ]


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if has_template(tokenizer):
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    return list(tokenizer(prompt)["input_ids"])


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    found = [*(ids if isinstance(ids, list | tuple) else [ids]), getattr(tokenizer, "eos_token_id", None)]
    return sorted({int(token) for token in found if token is not None})

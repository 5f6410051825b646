"""Speed: tokens/s of every strategy and of transformers' own `generate`, interleaved, in one run, by batch.

Each round decodes other prompts with every contender in turn, `--batch` of a set at once, about `--prompts` of each set
(a set that has fewer begins again); ratios are taken within a round, and the median and range over rounds are reported.
transformers is measured with its dynamic and its static cache, the latter compiled on a GPU (prompts are then padded to one
width, so that it compiles once), and the best counts; gpt-fast, where there is a clone of it, at batch 1. Tokens/s are of
all sequences of a batch, tokens/step of each; all is told over the sets and set by set. On a GPU the steps of all sizes
have been captured before (`LanguageModel.warm_up`), which took `capture_seconds`.

    python -m benchmarks.speed --dtype bfloat16 --output benchmarks/results/speed.cpu-2threads-avx512_bf16.json
    python -m benchmarks.speed --device cuda --batch 1 2 4 8 --max-new-tokens 128 --gpt-fast ../gpt-fast
"""

import json
import statistics
import time
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.common import chat, held_out_prompts, parser
from benchmarks.gpt_fast import GptFast
from shoestring.evaluation.results import write_result

SETS = ("mt_bench", "gsm8k", "humaneval")
Round = dict[str, dict[str, dict[str, float]]]
"""By contender and set: tokens, steps, seconds."""


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--prompts", type=int, default=2, help="prompts of each set in a round")
    arguments.add_argument("--batch", type=int, nargs="*", default=[1], help="prompts decoded at once")
    arguments.add_argument(
        "--seconds", type=float, default=1e9, help="begin no round after so many, shared among the batches"
    )
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    arguments.add_argument("--threads", type=int, help="CPU threads (all cores by default)")
    arguments.add_argument(
        "--decoding",
        nargs="*",
        default=["autoregressive", "lookahead", "lookahead(prompt_pool=True)", "ngram", "auto"],
    )
    arguments.add_argument("--no-transformers", action="store_true", help="our own strategies alone")
    arguments.add_argument(
        "--gpt-fast", type=Path, metavar="FOLDER", help="a clone of gpt-fast, to run beside"
    )
    options = arguments.parse_args()
    began = time.perf_counter()

    import torch

    import shoestring

    if options.threads:
        torch.set_num_threads(options.threads)
    model = shoestring.load(options.model, device=options.device, dtype=options.dtype)
    cost = model.step_cost(anew=True)  # what is remembered may be a busy machine's
    static = "transformers compiled" if model.device.type == "cuda" else "transformers static"
    contenders = [*([] if options.no_transformers else ["transformers dynamic", static]), *options.decoding]
    batches: dict[str, Any] = {}
    for position, batch in enumerate(options.batch):
        groups = max(1, options.prompts // batch)
        count = options.rounds * groups * batch
        chosen = {name: list(islice(cycle(held_out_prompts(name, count)), count)) for name in SETS}
        left = (options.seconds - (time.perf_counter() - began)) / (len(options.batch) - position)
        mine = contenders + (["gpt-fast"] if options.gpt_fast and batch == 1 else [])
        before = time.perf_counter()
        model.warm_up(batch)
        captured = round(time.perf_counter() - before, 2)
        rounds, warm_up = measure(model, mine, chosen, batch, groups, left, options)
        batches[str(batch)] = {
            "capture_seconds": captured,
            "rounds": len(rounds),
            "prompts_of_a_set": len(rounds) * groups * batch,
            "warm_up_seconds": warm_up,
            "contenders": {name: summary(rounds, name) for name in mine},
            "sets": {only: {name: summary(rounds, name, (only,)) for name in mine} for only in SETS},
        }
    result = {
        "benchmark": "speed",
        "model": options.model,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "max_new_tokens": options.max_new_tokens,
        "step_cost_ms": {
            str(rows): round(1000 * seconds, 2) for rows, seconds in zip(cost.rows, cost.seconds, strict=True)
        },
        "batches": batches,
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, str(model.model.device))


def measure(
    model: Any,
    contenders: list[str],
    chosen: dict[str, list[str]],
    batch: int,
    groups: int,
    seconds: float,
    options: Any,
) -> tuple[list[Round], dict[str, float]]:
    """Rounds of `groups` groups of `batch` prompts of each set, at least one, none begun after so many seconds."""
    encoded = {name: [model.encode(chat(prompt)) for prompt in prompts] for name, prompts in chosen.items()}
    width = max(len(ids) for every in encoded.values() for ids in every)
    arena = Arena(model, options.max_new_tokens, width, options.gpt_fast)
    began = time.perf_counter()
    warm_up = {}
    for contender in contenders:
        start = time.perf_counter()
        for _ in range(2):
            arena.run(contender, next(iter(encoded.values()))[:batch])
        warm_up[contender] = round(time.perf_counter() - start, 2)
        print(f"batch {batch}: {contender} warmed up in {warm_up[contender]} s", flush=True)
    rounds: list[Round] = []
    for index in range(options.rounds):
        if rounds and time.perf_counter() - began > seconds:
            break
        totals: Round = {
            name: {only: {"tokens": 0, "steps": 0, "seconds": 0} for only in SETS} for name in contenders
        }
        for name in SETS:
            mine = encoded[name][index :: options.rounds]
            for group in range(groups):
                prompts = mine[group * batch : (group + 1) * batch]
                for contender in contenders:
                    outcome = arena.run(contender, prompts)
                    for key, value in outcome.items():
                        totals[contender][name][key] += value
        rounds.append(totals)
        print(
            f"batch {batch}, round {index + 1} of {options.rounds}: "
            + ", ".join(f"{name} {speed(totals, name):.1f}" for name in contenders),
            flush=True,
        )
    return rounds, warm_up


class Arena:
    """Where contenders decode the same prompts, each in its own way.

    Args:
        tokens: the most new tokens of a text.
        width: tokens of the longest prompt.
        gpt_fast: a clone of it.
    """

    def __init__(self, model: Any, tokens: int, width: int, gpt_fast: Path | None) -> None:
        self.model, self.tokens, self.width, self.clone = model, tokens, width, gpt_fast
        self._plain_tokens = tokens

    @cached_property
    def gpt_fast(self) -> GptFast:
        """gpt-fast with the model's weights."""
        if self.clone is None:
            raise ValueError("no clone of gpt-fast was named")
        return GptFast(self.clone, self.model.model, self.width + self.tokens)

    def run(self, contender: str, prompts: list[list[int]]) -> dict[str, float]:
        """Decode these prompts at once: tokens, steps, seconds."""
        self.model.forget()  # no prefix is reused between contenders
        if contender == "gpt-fast":
            return self._gpt_fast(prompts)
        if contender.startswith("transformers "):
            return self._transformers(prompts, contender.removeprefix("transformers "))
        began = time.perf_counter()
        generations = self.model.generate(prompts, decoding=contender, max_new_tokens=self.tokens)
        seconds = time.perf_counter() - began
        tokens = sum(len(generation.token_ids) for generation in generations)
        if contender == "autoregressive":
            self._plain_tokens = tokens
        steps = sum(generation.steps for generation in generations)
        return {"tokens": tokens, "steps": steps, "seconds": seconds}

    def _gpt_fast(self, prompts: list[list[int]]) -> dict[str, float]:
        subject, (prompt,) = self.gpt_fast, prompts
        tokens = max(2, self._plain_tokens)  # its loop has at least one step
        began = time.perf_counter()
        count = len(subject.generate(prompt, tokens))
        return {"tokens": count, "steps": count, "seconds": time.perf_counter() - began}

    def _transformers(self, prompts: list[list[int]], kind: str) -> dict[str, float]:
        import torch

        model = self.model
        width = self.width if kind == "compiled" else max(map(len, prompts))
        pad = model.eos_ids[0]
        device = model.model.device
        inputs = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        attention = model.model.config._attn_implementation
        model.model.set_attn_implementation("sdpa")
        settings: dict[str, Any] = {} if kind == "dynamic" else {"cache_implementation": "static"}
        try:
            began = time.perf_counter()
            output = model.model.generate(
                inputs,
                attention_mask=mask,
                max_new_tokens=self.tokens,
                do_sample=False,
                eos_token_id=model.eos_ids,
                pad_token_id=pad,
                disable_compile=kind != "compiled",
                **settings,
            )
            texts = output[:, width:].tolist()
            seconds = time.perf_counter() - began
        finally:
            model.model.set_attn_implementation(attention)
        count = sum(length_of(text, model.eos_ids) for text in texts)
        return {"tokens": count, "steps": count, "seconds": seconds}


def length_of(text: list[int], ends: list[int]) -> int:
    """Tokens up to the first that ends the text, that one included."""
    return next((at + 1 for at, token in enumerate(text) if token in ends), len(text))


def speed(totals: Round, contender: str, sets: tuple[str, ...] = SETS) -> float:
    """Tokens per second over some sets."""
    parts = [totals[contender][name] for name in sets]
    return sum(part["tokens"] for part in parts) / sum(part["seconds"] for part in parts)


def summary(rounds: list[Round], name: str, sets: tuple[str, ...] = SETS) -> dict[str, Any]:
    theirs = [contender for contender in rounds[0] if contender.startswith("transformers")]

    def ratio(over: list[str]) -> dict[str, Any]:
        found = [
            speed(totals, name, sets) / max(speed(totals, other, sets) for other in over) for totals in rounds
        ]
        middle, low, high = (round(value, 3) for value in (statistics.median(found), min(found), max(found)))
        return {"median": middle, "range": [low, high]}

    parts = [totals[name][only] for totals in rounds for only in sets]
    peers = {}
    if theirs:
        peers["over_best_transformers"] = ratio(theirs)
        peers["over_eager_transformers"] = ratio(["transformers dynamic"])
    if "gpt-fast" in rounds[0]:
        peers["over_gpt_fast"] = ratio(["gpt-fast"])
    return {
        "tokens_per_step": round(
            sum(part["tokens"] for part in parts) / sum(part["steps"] for part in parts), 3
        ),
        "tokens_per_second": round(statistics.median(speed(totals, name, sets) for totals in rounds), 2),
        "over_autoregressive": ratio(["autoregressive"]),
        **peers,
    }


if __name__ == "__main__":
    main()

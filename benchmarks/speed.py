"""Speed: tokens/s of every strategy and of transformers' own `generate`, interleaved, in one run.

Each round decodes other prompts with every contender in turn; ratios are taken within a round, and the median and
range over rounds are reported. transformers is measured with its dynamic and its static cache and the better counts.

    python -m benchmarks.speed --dtype bfloat16 --output benchmarks/results/speed.cpu-2threads-avx512_bf16.json
"""

import json
import statistics
import time
from typing import Any

from benchmarks.common import chat, held_out_prompts, parser
from shoestring.evaluation.results import write_result

SETS = ("mt_bench", "gsm8k", "humaneval")


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--prompts", type=int, default=2, help="prompts of each set in a round")
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    arguments.add_argument("--threads", type=int, help="CPU threads (all cores by default)")
    arguments.add_argument(
        "--decoding",
        nargs="*",
        default=["autoregressive", "lookahead", "lookahead(prompt_pool=True)", "ngram", "auto"],
    )
    options = arguments.parse_args()

    import torch

    import shoestring

    if options.threads:
        torch.set_num_threads(options.threads)
    model = shoestring.load(options.model, device=options.device, dtype=options.dtype)
    cost = model.step_cost()
    contenders = ["transformers dynamic", "transformers static", *options.decoding]
    chosen = {name: held_out_prompts(name, options.rounds * options.prompts) for name in SETS}
    rounds: list[dict[str, dict[str, float]]] = []
    for contender in contenders:  # warm up
        run(model, contender, chat("Hello"), 16)
    for index in range(options.rounds):
        totals: dict[str, dict[str, float]] = {
            name: {"tokens": 0, "steps": 0, "seconds": 0} for name in contenders
        }
        for name in SETS:
            for prompt in chosen[name][index :: options.rounds]:
                for contender in contenders:
                    outcome = run(model, contender, chat(prompt), options.max_new_tokens)
                    for key, value in outcome.items():
                        totals[contender][key] += value
        rounds.append(totals)
        print(f"round {index + 1} of {options.rounds}: " + line(totals), flush=True)
    result = {
        "benchmark": "speed",
        "model": options.model,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "prompts": {name: len(prompts) for name, prompts in chosen.items()},
        "max_new_tokens": options.max_new_tokens,
        "step_cost_ms": {
            str(rows): round(1000 * seconds, 2) for rows, seconds in zip(cost.rows, cost.seconds, strict=True)
        },
        "contenders": {name: summary(rounds, name) for name in contenders},
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, str(model.model.device))


def run(model: Any, contender: str, messages: list[dict[str, str]], tokens: int) -> dict[str, float]:
    model.forget()  # no prefix is reused between contenders
    if not contender.startswith("transformers"):
        generation = model.generate(messages, decoding=contender, max_new_tokens=tokens)
        return {
            "tokens": len(generation.token_ids),
            "steps": generation.steps,
            "seconds": generation.seconds,
        }
    import torch

    inputs = torch.tensor([model.encode(messages)], device=model.model.device)
    attention = model.model.config._attn_implementation
    model.model.set_attn_implementation("sdpa")
    settings: dict[str, Any] = {} if "dynamic" in contender else {"cache_implementation": "static"}
    try:
        began = time.perf_counter()
        output = model.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=model.eos_ids,
            pad_token_id=model.eos_ids[0],
            disable_compile=True,
            **settings,
        )
        count = len(output[0].tolist()) - inputs.shape[1]
        return {"tokens": count, "steps": count, "seconds": time.perf_counter() - began}
    finally:
        model.model.set_attn_implementation(attention)


def line(totals: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {total['tokens'] / total['seconds']:.1f}" for name, total in totals.items())


def summary(rounds: list[dict[str, dict[str, float]]], name: str) -> dict[str, Any]:
    def speed(totals: dict[str, dict[str, float]], contender: str) -> float:
        return totals[contender]["tokens"] / totals[contender]["seconds"]

    def ratios(over: list[str]) -> list[float]:
        return [speed(totals, name) / max(speed(totals, other) for other in over) for totals in rounds]

    plain = ratios(["autoregressive"])
    theirs = ratios(["transformers dynamic", "transformers static"])
    return {
        "tokens_per_step": round(
            sum(r[name]["tokens"] for r in rounds) / sum(r[name]["steps"] for r in rounds), 3
        ),
        "tokens_per_second": round(statistics.median(speed(totals, name) for totals in rounds), 2),
        "over_autoregressive": {
            "median": round(statistics.median(plain), 3),
            "range": [round(min(plain), 3), round(max(plain), 3)],
        },
        "over_best_transformers": {
            "median": round(statistics.median(theirs), 3),
            "range": [round(min(theirs), 3), round(max(theirs), 3)],
        },
    }


if __name__ == "__main__":
    main()

"""Exactness: every strategy gives the tokens of plain decoding, greedy and sampled, and those of transformers.

fp32: token equality; where texts part, the top-2 gap at that place is listed. bf16 and fp16: every token after the
place where texts part lies within 2 ulp of the maximum of the plain one-row step (checked teacher-forced), and the
rate and places of parting are reported. Resumable: rows already in --rows are kept; --shard I/N splits the work.

    python -m benchmarks.exactness --dtype float32 --rows runs/exactness-fp32.jsonl --output benchmarks/results/...
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common import ResumableRows, chat, parser
from shoestring.evaluation.parting import find_parting
from shoestring.evaluation.prompts import load_prompts
from shoestring.evaluation.results import write_result

STRATEGIES = [
    "lookahead(window=15,ngram=5,guesses=15)",
    "lookahead(window=15,ngram=5,guesses=15,prompt_pool=True)",
    "ngram",
    "auto(budget=24)",  # which never rests
]


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--rows", type=Path, required=True)
    arguments.add_argument("--shard", default="0/1", help="I/N: do every Nth prompt from I on")
    arguments.add_argument("--prompts", type=int, default=40)
    arguments.add_argument("--kinds", nargs="*", default=["greedy", "sampled"])
    arguments.add_argument("--only-merge", action="store_true", help="measure nothing more")
    arguments.add_argument("--merge", type=Path, nargs="*", default=[], help="rows of other shards")
    options = arguments.parse_args()

    import shoestring

    shard, shards = map(int, options.shard.split("/"))
    rows = ResumableRows(options.rows)
    for path in options.merge:
        rows.rows.update(ResumableRows(path).rows)
    jobs: dict[str, tuple[int, float, int, int]] = {}
    if "greedy" in options.kinds:
        jobs |= {f"greedy-{index}": (index, 0.0, 0, 128) for index in range(options.prompts)}
    for index in range(8) if "sampled" in options.kinds else ():
        for seed in range(3):
            jobs[f"sampled-{index}-{seed}"] = (index * options.prompts // 8, 0.8, seed, 64)
    mine = [key for key in list(jobs)[shard::shards] if key not in rows.rows and not options.only_merge]
    prompts = load_prompts("mt_bench", options.prompts)
    model = None
    for done, key in enumerate(mine):
        if model is None:
            model = shoestring.load(options.model, device=options.device, dtype=options.dtype)
        index, temperature, seed, tokens = jobs[key]
        rows.add(key, measure(model, prompts[index], temperature, seed, tokens))
        print(f"{key} ({done + 1} of {len(mine)})", flush=True)
    if missing := set(jobs) - set(rows.rows):
        print(f"{len(missing)} of {len(jobs)} texts are still to be measured")
    else:
        result = summarise(rows, options)
        print(json.dumps(result))
        if options.output:
            write_result(options.output, result, options.device)


def measure(model: Any, prompt: str, temperature: float, seed: int, tokens: int) -> dict[str, Any]:
    settings = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed}
    if temperature:
        settings["top_p"] = 0.95
    ids = model.encode(chat(prompt))
    plain = model.generate(ids, decoding="autoregressive", **settings)
    row: dict[str, Any] = {"tokens": len(plain.token_ids), "strategies": {}}
    for strategy in STRATEGIES:
        generation = model.generate(ids, decoding=strategy, **settings)
        outcome = {"tokens": len(generation.token_ids), "steps": generation.steps}
        outcome.update(parting(model, ids, plain.token_ids, generation.token_ids, greedy=not temperature))
        row["strategies"][strategy] = outcome
    if not temperature:
        theirs = transformers_greedy(model, ids, tokens)
        row["strategies"]["transformers"] = {
            "tokens": len(theirs),
            "steps": len(theirs),
            **parting(model, ids, plain.token_ids, theirs, greedy=True),
        }
    return row


def transformers_greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    import torch

    module, eos = model.model, model.eos_ids
    attention = module.config._attn_implementation
    module.set_attn_implementation("sdpa")
    try:
        inputs = torch.tensor([ids], device=module.device)
        output = module.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0],
        )
    finally:
        module.set_attn_implementation(attention)
    return [int(token) for token in output[0, len(ids) :]]


def parting(model: Any, ids: list[int], plain: list[int], other: list[int], greedy: bool) -> dict[str, Any]:
    found = find_parting(model.runner, ids, plain, other, model.dtype)
    if found is None:
        return {"equal": True}
    row = {"equal": False, "parts_at": found.at, "gap": found.gap}
    # A sampled token need not lie near the maximum.
    return {**row, "worst_ulp": found.worst_ulp} if greedy else row


def summarise(rows: ResumableRows, options: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for kind in options.kinds:
        totals: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"texts": 0, "equal": 0, "tokens": 0, "steps": 0, "parted": []}
        )
        for key, row in rows.rows.items():
            if not key.startswith(kind):
                continue
            for strategy, outcome in row["strategies"].items():
                total = totals[strategy]
                total["texts"] += 1
                total["equal"] += outcome["equal"]
                total["tokens"] += outcome["tokens"]
                total["steps"] += outcome["steps"]
                if not outcome["equal"]:
                    total["parted"].append(
                        {
                            "text": key,
                            **{k: v for k, v in outcome.items() if k not in ("equal", "tokens", "steps")},
                        }
                    )
        for total in totals.values():
            total["tokens_per_step"] = round(total["tokens"] / total["steps"], 3)
        summary[kind] = dict(totals)
    return {
        "benchmark": "exactness",
        "model": options.model,
        "dtype": options.dtype,
        "prompts": "mt_bench",
        **summary,
    }


if __name__ == "__main__":
    main()

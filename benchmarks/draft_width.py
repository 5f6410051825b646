"""Tokens per step of `auto` by the rows that it may draft: what drafts are worth, whatever a step costs.

The other half is a step's time by its rows (`step_cost.py`, `gpu_step_cost.py`). Greedy, on prompts that served for no
tuning; tokens per step do not depend on the machine but for near ties in low precision.

    python -m benchmarks.draft_width --output benchmarks/results/draft-width.cpu-2threads-avx512_bf16.json
"""

import json

from benchmarks.common import chat, held_out_prompts, parser
from shoestring.evaluation.results import write_result

SETS = ("mt_bench", "gsm8k", "humaneval")


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--prompts", type=int, default=8, help="of each set")
    arguments.add_argument("--budgets", type=int, nargs="*", default=[3, 7, 15, 31, 63])
    arguments.add_argument("--max-new-tokens", type=int, default=128)
    options = arguments.parse_args()

    import shoestring

    model = shoestring.load(options.model, device=options.device, dtype=options.dtype)
    budgets: dict[str, dict[str, float]] = {}
    for budget in options.budgets:
        row = {}
        for name in SETS:
            tokens = steps = 0
            for prompt in held_out_prompts(name, options.prompts):
                generation = model.generate(
                    chat(prompt), decoding=f"auto(budget={budget})", max_new_tokens=options.max_new_tokens
                )
                tokens, steps = tokens + len(generation.token_ids), steps + generation.steps
            row[name] = round(tokens / steps, 3)
        budgets[str(budget)] = row
        print(f"{budget} rows: {row}", flush=True)
    result = {
        "benchmark": "draft-width",
        "model": options.model,
        "dtype": options.dtype,
        "prompts_of_a_set": options.prompts,
        "max_new_tokens": options.max_new_tokens,
        "look_ahead": model.look_ahead is not None,
        "tokens_per_step": budgets,
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, str(model.device))


if __name__ == "__main__":
    main()

"""Acceptance rates: how often each kind of guess that `auto` makes comes true; its priors are rounded from these.

Measured on `tuning_prompts`, which the speed benchmark leaves out.

    python -m benchmarks.acceptance_rates --output benchmarks/results/acceptance-rates.cpu-2threads-avx512_bf16.json
"""

import json
from collections import Counter
from typing import Any

from benchmarks.common import chat, parser, tuning_prompts
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.rates import AcceptanceRates, Guess
from shoestring.evaluation.results import write_result

SETS = ("mt_bench", "gsm8k", "humaneval")


class CountedRates(AcceptanceRates):
    """Rates that also count every guess put to the test."""

    def __init__(self, hits: Counter[Guess], trials: Counter[Guess]) -> None:
        super().__init__(native=False)  # the native guesses count for themselves
        self._hits, self._trials = hits, trials

    def observe(self, guess: Guess, hit: bool) -> None:
        self._trials[guess] += 1
        self._hits[guess] += hit
        super().observe(guess, hit)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    arguments.add_argument(
        "--budget", type=int, help="rows beside the last token's (the measured cost decides)"
    )
    options = arguments.parse_args()

    import shoestring

    model = shoestring.load(options.model, device=options.device, dtype=options.dtype)
    hits: Counter[Guess] = Counter()
    trials: Counter[Guess] = Counter()
    for name in SETS:
        for prompt in tuning_prompts(name):
            drafter = MergedDrafter(
                model.step_cost(),
                options.budget,
                rates=CountedRates(hits, trials),
                known=model.successors(),
                datastore=model.datastore(),
            )
            model.generate(chat(prompt), decoding=drafter, max_new_tokens=options.max_new_tokens)
    rates: list[dict[str, Any]] = [
        {
            "source": source,
            "length": length,
            "rank": rank,
            "trials": trials[source, length, rank],
            "rate": round(hits[source, length, rank] / trials[source, length, rank], 3),
        }
        for source, length, rank in sorted(trials)
    ]
    result = {
        "benchmark": "acceptance-rates",
        "model": options.model,
        "dtype": options.dtype,
        "prompts": {name: len(tuning_prompts(name)) for name in SETS},
        "rates": rates,
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, str(model.model.device))


if __name__ == "__main__":
    main()

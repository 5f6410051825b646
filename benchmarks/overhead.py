"""Overhead: what the host does per step beside the forward pass, and what seeded sampling costs.

Host work is the time of a whole decode less the time spent in the runner and in reading its results (next tokens,
arg-maxes, top-k): drafting, merging, building trees, verifying, stopping. Sampling is timed on the same rows as greedy.

    python -m benchmarks.overhead --output benchmarks/results/overhead.cpu-2threads-avx512_bf16.json
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import chat, parser
from shoestring.evaluation.prompts import load_prompts
from shoestring.evaluation.results import write_result

STRATEGIES = ["autoregressive", "lookahead(window=8,ngram=5,guesses=8)", "auto(budget=63)", "auto"]
TIMED = {"step", "commit", "open", "release", "next_token", "argmax", "top_k"}


class Stopwatch:
    """Passes calls on to what it wraps and adds up the time of those in `TIMED`, results included."""

    def __init__(self, wrapped: Any, spent: list[float]) -> None:
        self._wrapped, self._spent = wrapped, spent

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        return self._timed(value) if name in TIMED else value

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            self._spent[0] += time.perf_counter() - began
            if isinstance(result, dict):
                return {slot: Stopwatch(rows, self._spent) for slot, rows in result.items()}
            return result

        return timed


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    options = arguments.parse_args()

    import shoestring

    model = shoestring.load(options.model, device=options.device, dtype=options.dtype)
    prompts = load_prompts("mt_bench", 5)
    plain_runner = model.runner
    host: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for prompt in [prompts[0], *prompts]:
        ids = model.encode(chat(prompt))  # once a text, not once a step
        for name in STRATEGIES:
            spent = [0.0]
            model.runner = Stopwatch(plain_runner, spent)
            model.forget()
            began = time.perf_counter()
            generation = model.generate(ids, decoding=name, max_new_tokens=options.max_new_tokens)
            host[name].append((time.perf_counter() - began - spent[0]) / generation.steps)
    model.runner = plain_runner
    result = {
        "benchmark": "overhead",
        "model": options.model,
        "dtype": options.dtype,
        # The first prompt warmed up.
        "host_ms_per_step": {
            name: round(1000 * statistics.median(times[1:]), 3) for name, times in host.items()
        },
        "sampling": sampling_cost(model, prompts, options.max_new_tokens),
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, str(model.model.device))


def sampling_cost(model: Any, prompts: list[str], tokens: int) -> dict[str, float]:
    """Seconds per plain step, greedy and sampled (temperature 0.8, top-p 0.95), and the median of their ratios."""
    times: dict[str, list[float]] = {"greedy": [], "sampled": []}
    settings: dict[str, dict[str, float]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}
    for prompt in prompts:
        for name, chosen in settings.items():
            model.forget()
            generation = model.generate(
                chat(prompt), decoding="autoregressive", max_new_tokens=tokens, **chosen
            )
            times[name].append(generation.seconds / generation.steps)
    ratios = [sampled / greedy for greedy, sampled in zip(times["greedy"], times["sampled"], strict=True)]
    return {name: round(1000 * statistics.median(seconds), 3) for name, seconds in times.items()} | {
        "ratio": round(statistics.median(ratios), 3)
    }


if __name__ == "__main__":
    main()

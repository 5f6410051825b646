"""PaSS: tokens per step for L = 1..8, trained and untrained, fused and in two calls, as a chain and as a tree, inside auto.

Two kinds of rows. "steps": many texts at once, tokens per step and equality with plain decoding (which holds in fp32),
under a fixed row budget, so that nothing depends on the machine. "speed": one text at a time, contenders in turn, tokens/s
as ratios within a text; rows as the measured step cost allows. Prompts are none of those that tuned `auto` or trained the
embeddings. Resumable: rows already in --rows are kept; --shard I/N splits the work over processes.

    python -m benchmarks.pass_decoding --rows runs/pass.jsonl --output benchmarks/results/pass_decoding.NAME.json
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ResumableRows, chat, held_out_prompts, parser
from shoestring.evaluation.parting import find_parting
from shoestring.evaluation.results import write_result

SETS = ("mt_bench", "humaneval")
TEMPERATURES = (0.0, 0.8)
PLAIN = "autoregressive"
BUDGET = 48
SPEED = [
    PLAIN,
    "pass(two_call=true)",
    "pass(candidates=1)",
    "pass",
    "auto(look_ahead=false)",
    "auto",
]


@dataclass(frozen=True)
class Contender:
    """A strategy, and which embeddings it is given."""

    decoding: str
    embeddings: str = "trained"

    @property
    def name(self) -> str:
        return self.decoding if self.embeddings == "trained" else f"{self.decoding} {self.embeddings}"


def contenders(most: int, tokens: int) -> list[Contender]:
    """What is compared: sweeps over L, and the controls at one L (`tokens`)."""
    tree = f"budget={BUDGET}"
    # What is asked first comes first: a run may be cut short.
    counts = sorted(range(1, most + 1), key=lambda count: (count != tokens, -count % 2, -count))
    forms = ("budget={budget}", "two_call=true", "candidates=1,budget={budget}")
    swept = [
        Contender(f"pass(tokens={count},{form.format(budget=BUDGET)})") for count in counts for form in forms
    ]
    inside = [Contender(f"auto({tree})"), Contender(f"auto({tree},look_ahead=false)")]
    controls = [
        Contender(f"pass(tokens={tokens},{form})", untrained)
        for untrained in ("mean", "random")
        for form in (tree, "two_call=true")
    ]
    return [*swept[:3], *inside, *controls, *swept[3:]]


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--look-ahead", help="embeddings (the model's own if left out)")
    arguments.add_argument("--kind", choices=["steps", "speed"], default="steps")
    arguments.add_argument("--rows", type=Path, required=True)
    arguments.add_argument("--shard", default="0/1", help="I/N: do every Nth job from I on")
    arguments.add_argument("--prompts", type=int, default=16, help="of each set")
    arguments.add_argument("--batch", type=int, default=8, help="texts decoded together (steps)")
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    arguments.add_argument("--tokens", type=int, default=6, help="L of the controls")
    arguments.add_argument("--most", type=int, default=8, help="the largest L")
    arguments.add_argument("--decoding", nargs="*", help="only these strategies (beside plain decoding)")
    arguments.add_argument("--merge", type=Path, nargs="*", default=[], help="rows of other shards")
    arguments.add_argument("--only-merge", action="store_true", help="measure nothing more")
    options = arguments.parse_args()

    rows = ResumableRows(options.rows)
    for path in options.merge:
        rows.rows.update(ResumableRows(path).rows)
    if not options.only_merge:
        shard, shards = map(int, options.shard.split("/"))
        import shoestring

        model = shoestring.load(
            options.model, device=options.device, dtype=options.dtype, look_ahead=options.look_ahead
        )
        measure = steps if options.kind == "steps" else speed
        for key, row in measure(model, options, shard, shards, rows.rows):
            rows.add(key, row)
            print(key, flush=True)
    if rows.rows:
        result = summarise(rows, options)
        print(json.dumps(result))
        if options.output:
            write_result(options.output, result, options.device)


def steps(
    model: Any, options: Any, shard: int, shards: int, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each group of texts and contender, plain decoding first."""
    embeddings = {"trained": model.look_ahead, **untrained(model, options.most)}
    jobs = [
        (name, temperature, start)
        for start in range(0, options.prompts, options.batch)
        for name in SETS
        for temperature in TEMPERATURES
    ]
    chosen = [
        contender
        for contender in contenders(options.most, options.tokens)
        if not options.decoding or contender.name in options.decoding
    ]
    # Several processes may share a group of texts, each with its own contenders.
    parts = max(1, shards // len(jobs))
    work = [(job, chosen[part::parts]) for job in jobs for part in range(parts)]
    for (name, temperature, start), mine in work[shard::shards]:
        prompts = held_out_prompts(name, options.prompts)[start : start + options.batch]
        ids = [model.encode(chat(prompt)) for prompt in prompts]
        plain: list[list[int]] = []
        for contender in [Contender(PLAIN), *mine]:
            key = f"steps/{name}/{temperature}/{start}/{contender.name}"
            if key in known and plain:
                continue
            model.look_ahead = embeddings[contender.embeddings]
            outcome, tokens = decoded(model, ids, contender.decoding, temperature, options.max_new_tokens)
            plain = plain or tokens
            partings = []
            for at, (ours, theirs) in enumerate(zip(tokens, plain, strict=True)):
                found = find_parting(model.runner, ids[at], theirs, ours, model.dtype)
                if found is not None:
                    partings.append({"text": start + at, "at": found.at, "gap": found.gap})
            if key not in known:
                yield key, {**outcome, "texts": len(ids), "parted": partings}
    model.look_ahead = embeddings["trained"]


def decoded(
    model: Any, ids: list[list[int]], decoding: str, temperature: float, most: int
) -> tuple[dict[str, int], list[list[int]]]:
    """Decode texts together: tokens, steps and drafted rows over all, and each text's tokens."""
    model.forget()
    totals = {"tokens": 0, "steps": 0, "rows": 0}
    texts: list[list[int]] = [[] for _ in ids]
    for piece in model.stream(ids, decoding=decoding, temperature=temperature, seed=1, max_new_tokens=most):
        totals["rows"] += sum(rows for rows, _ in (piece.trace or {}).values())
        if piece.generation is not None:
            texts[piece.index] = piece.generation.token_ids
            totals["tokens"] += len(piece.generation.token_ids)
            totals["steps"] += piece.generation.steps
    return totals, texts


def speed(
    model: Any, options: Any, shard: int, shards: int, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each text: every contender's tokens, steps and seconds."""
    names = [PLAIN, *options.decoding] if options.decoding else SPEED
    for name in names:
        model.generate(chat("Hello"), decoding=name, max_new_tokens=8)
    # Sets and temperatures take turns, so that a run that is cut short has some of each.
    jobs = [
        (name, temperature, index)
        for index in range(options.prompts)
        for temperature in TEMPERATURES
        for name in SETS
    ]
    for name, temperature, index in jobs[shard::shards]:
        key = f"speed/{name}/{temperature}/{index}"
        if key in known:
            continue
        ids = model.encode(chat(held_out_prompts(name, options.prompts)[index]))
        row: dict[str, Any] = {}
        for decoding in names:
            model.forget()
            generation = model.generate(
                ids, decoding=decoding, temperature=temperature, seed=1, max_new_tokens=options.max_new_tokens
            )
            row[decoding] = {
                "tokens": len(generation.token_ids),
                "steps": generation.steps,
                "seconds": round(generation.seconds, 5),
            }
        yield key, {"contenders": row, "step_cost_ms": cost_of(model), "processes": shards}


def untrained(model: Any, most: int) -> dict[str, Any]:
    """The negative control: what training begins with, and random embeddings."""
    from shoestring.decoding.look_ahead import LookAhead
    from shoestring.finetuning.pass_model import initial_embeddings

    found: dict[str, Any] = {}
    for how in ("mean", "random"):
        vectors = initial_embeddings(model.model, most, how)  # type: ignore[arg-type]
        found[how] = LookAhead(vectors).placed(model.device, model.dtype)
    return found


def cost_of(model: Any) -> dict[str, float]:
    cost = model.step_cost()
    return {
        str(rows): round(1000 * seconds, 2) for rows, seconds in zip(cost.rows, cost.seconds, strict=True)
    }


def summarise(rows: ResumableRows, options: Any) -> dict[str, Any]:
    totals: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    texts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    costs: dict[str, float] = {}
    processes = 1
    for key, row in rows.rows.items():
        kind, name, temperature, _, *contender = key.split("/", 4)
        cell = f"{name}, T={temperature}"
        if kind == "speed":
            texts[cell].append(row["contenders"])
            costs, processes = row["step_cost_ms"], row["processes"]
            continue
        total = totals[cell].setdefault(
            contender[0], {"texts": 0, "tokens": 0, "steps": 0, "rows": 0, "parted": []}
        )
        for count in ("texts", "tokens", "steps", "rows"):
            total[count] += row[count]
        total["parted"] += row["parted"]
    for cell in totals.values():
        for total in cell.values():
            total["tokens_per_step"] = round(total["tokens"] / total["steps"], 3)
            total["rows_per_step"] = round(1 + total["rows"] / total["steps"], 1)
            total["equal"] = total["texts"] - len(total["parted"])
    speeds = {cell: {name: speed_of(found, name) for name in found[0]} for cell, found in texts.items()}
    return {
        "benchmark": "pass_decoding",
        "model": options.model,
        "dtype": options.dtype,
        "prompts": options.prompts,
        "max_new_tokens": options.max_new_tokens,
        "embeddings": trained_as(options.look_ahead or options.model),
        "steps": {cell: dict(sorted(found.items())) for cell, found in sorted(totals.items())},
        "step_cost_ms": costs,
        "processes": processes,
        "speed": dict(sorted(speeds.items())),
    }


def speed_of(texts: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Tokens/s over plain decoding's in the same text: median and range over texts."""

    def rate(text: dict[str, Any], contender: str) -> float:
        tokens: float = text[contender]["tokens"] / text[contender]["seconds"]
        return tokens

    ratios = [rate(text, name) / rate(text, PLAIN) for text in texts]
    return {
        "texts": len(texts),
        "tokens_per_step": round(
            sum(t[name]["tokens"] for t in texts) / sum(t[name]["steps"] for t in texts), 3
        ),
        "tokens_per_second": round(statistics.median(rate(text, name) for text in texts), 2),
        "over_autoregressive": {
            "median": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
        },
    }


def trained_as(look_ahead: str) -> dict[str, Any]:
    """What the embeddings' manifest says of their training."""
    from shoestring.decoding.look_ahead import bundled_look_ahead, read_look_ahead

    found = bundled_look_ahead(look_ahead) or (
        read_look_ahead(look_ahead) if Path(look_ahead).exists() else None
    )
    if found is None:
        return {}
    recipe = found.manifest.get("recipe", {})
    chosen = ("tokens", "loss", "decay", "initial", "steps", "learning_rate", "seed")
    return {
        "recipe": {name: recipe.get(name) for name in chosen},
        "data": found.manifest.get("data"),
        "held_out": found.manifest.get("results"),
    }


if __name__ == "__main__":
    main()

"""Tables of what decoding strategies give: equal texts, tokens a step, tokens a second, PaSS."""

from benchmarks.result_files import Result, load_results, table


def exactness(dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> str:
    """How many texts are equal to plain decoding's, by precision and strategy."""
    parts = []
    for name, result in load_results("exactness"):
        if result["dtype"] not in dtypes:
            continue
        rows = []
        for kind in ("greedy", "sampled"):
            for strategy, total in result.get(kind, {}).items():
                parted = total["parted"]
                if result["dtype"] == "float32":
                    gaps = [row["gap"] for row in parted if row["gap"] is not None]
                    worst = f"largest gap {max(gaps):.1e}" if gaps else ""
                else:
                    ulps = [row["worst_ulp"] for row in parted if row.get("worst_ulp") is not None]
                    worst = f"worst {max(ulps):.2g} ulp" if ulps else ""
                equal, each = f"{total['equal']} of {total['texts']}", f"{total['tokens_per_step']:.2f}"
                rows.append([f"`{strategy}`", kind, each, equal, worst or "-"])
        parts.append(
            f"{result['model']}, {result['dtype']}, MT-Bench prompts, texts equal to plain decoding's "
            f"({result['machine']}, commit {result['commit']}, [{name}](RESULTS/{name})):\n\n"
            + table(["against", "", "tokens/step", "equal", "where they part"], rows)
        )
    return "\n".join(parts)


def tokens_per_step() -> str:
    """Tokens per step of each strategy on MT-Bench, fp32, as measured last; of `auto` with a budget, which never rests."""
    wide = [one for one in load_results("exactness") if one[1]["dtype"] == "float32"]
    if not wide:
        return ""
    name, result = max(wide, key=lambda one: one[1]["date"])
    rows = [
        [f"`{strategy}`", f"{total['tokens_per_step']:.2f}"]
        for strategy, total in result["greedy"].items()
        if strategy not in ("transformers", "auto")
    ]
    return (
        f"{result['model']}, {result['dtype']}, greedy, MT-Bench, commit {result['commit']} "
        f"([{name}](RESULTS/{name}); the paper's "
        "7B model with window 15, n-gram 5, guesses 15: 1.96, with prompt pool 2.05):\n\n"
        + table(["strategy", "tokens/step"], rows)
    )


_USUAL_TOKENS = 128


def speed(machines: str = "", all_batches: bool = False) -> str:
    """Tokens per second of each strategy, as ratios within one run; of machines whose names begin so.

    Longer texts, in which a small model repeats itself, stand with all batches only.
    """
    parts = []
    for name, result in load_results("speed"):
        longer = result["max_new_tokens"] > _USUAL_TOKENS and not all_batches
        if longer or not result["machine"].startswith(machines):
            continue
        batches = result.get("batches") or {"1": result}  # older files are of one batch
        parts += [
            _speed_part(name, result, batch, cell)
            for batch, cell in batches.items()
            if batch == "1" or all_batches
        ]
    return "\n".join(parts)


def draft_width() -> str:
    """Tokens per step of `auto` by its rows."""
    parts = []
    for name, result in load_results("draft-width"):
        found = result["tokens_per_step"]
        rows = [
            [f"{budget} rows", *(f"{value:.2f}" for value in row.values())] for budget, row in found.items()
        ]
        with_ = "with" if result["look_ahead"] else "without"
        parts.append(
            f"{result['model']}, {result['dtype']}, greedy, {result['prompts_of_a_set']} prompts of a set, up to "
            f"{result['max_new_tokens']} tokens, {with_} look-ahead embeddings, {result['machine']}, commit "
            f"{result['commit']} ([{name}](RESULTS/{name})):\n\n"
            + table(["beside the last token's", "MT-Bench", "GSM8K", "HumanEval"], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"


_SPEED_COLUMNS = {
    "over_autoregressive": "over plain",
    "over_best_transformers": "over transformers' best",
    "over_eager_transformers": "over transformers' eager",
    "over_gpt_fast": "over gpt-fast",
}


def _speed_part(name: str, result: Result, batch: str, cell: Result) -> str:
    contenders = cell["contenders"]
    columns = [column for column in _SPEED_COLUMNS if all(column in row for row in contenders.values())]
    rows = []
    for contender, row in contenders.items():
        ours = not contender.startswith("transformers") and contender != "gpt-fast"
        cells = [f"`{contender}`" if ours else contender, f"{row['tokens_per_step']:.2f}"]
        cells.append(f"{row['tokens_per_second']:.1f}")
        for column in columns:
            low, high = row[column]["range"]
            spread = f" ({low:.2f}-{high:.2f})" if column == columns[0] and low < high else ""
            cells.append(f"{row[column]['median']:.2f}x{spread}")
        if "sets" in cell:
            of_sets = [found[contender]["over_autoregressive"]["median"] for found in cell["sets"].values()]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in of_sets))
        rows.append(cells)
    rounds = cell.get("rounds", 5)
    heads = ["", "tokens/step", "tokens/s", *(_SPEED_COLUMNS[column] for column in columns)]
    if "sets" in cell:
        heads.append("over plain, set by set")
    note = f"; {result['note']}" if "note" in result else ""
    return (
        f"{result['model']}, {result['dtype']}, batch {batch}, greedy, up to {result['max_new_tokens']} tokens, "
        "MT-Bench + GSM8K + HumanEval, "
        f"{result['machine']}, commit {result['commit']} "
        f"([{name}](RESULTS/{name})); ratios are medians over {rounds} round{'s' * (rounds != 1)} of one run{note}:\n\n"
        + table(heads, rows)
    )


_PASS_FORMS = {
    "two calls": "pass(tokens={count},two_call=true)",
    "fused, a chain": "pass(tokens={count},candidates=1,budget=48)",
    "fused, a tree": "pass(tokens={count},budget=48)",
}


def _pass_results(part: str) -> list[tuple[str, Result]]:
    return [(name, result) for name, result in load_results("pass_decoding") if result[part]]


def pass_steps() -> str:
    """PaSS: tokens per step by L, for every form, text and temperature."""
    parts = []
    for name, result in _pass_results("steps"):
        counts = range(1, 9)
        rows = []
        for cell, found in result["steps"].items():
            for form, decoding in _PASS_FORMS.items():
                totals = [found.get(decoding.format(count=count)) for count in counts]
                rows.append(
                    [f"{cell}, {form}", *(f"{t['tokens_per_step']:.2f}" if t else "" for t in totals)]
                )
        texts = sum(total["texts"] for found in result["steps"].values() for total in found.values())
        equal = sum(total["equal"] for found in result["steps"].values() for total in found.values())
        parts.append(
            f"{result['model']}, {result['dtype']}, tokens/step by the number of look-ahead tokens L; {equal} of {texts} "
            f"texts equal plain decoding's ({result['machine']}, commit {result['commit']}, [{name}](RESULTS/{name})):\n\n"
            + table(["", *(f"L={count}" for count in counts)], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"


def pass_controls() -> str:
    """PaSS: untrained embeddings, and what PaSS adds to `auto`."""
    parts = []
    for name, result in _pass_results("steps"):
        cells = result["steps"]
        swept = {form.format(count=count) for form in _PASS_FORMS.values() for count in range(1, 9)}
        names = dict.fromkeys(key for found in cells.values() for key in found if key not in swept)
        shown = [form.format(count=6) for form in _PASS_FORMS.values()] + [*names]
        rows = [
            [
                f"`{key}`",
                *(f"{found[key]['tokens_per_step']:.2f}" if key in found else "" for found in cells.values()),
            ]
            for key in shown
        ]
        parts.append(
            f"tokens/step; `mean` and `random` are untrained embeddings ([{name}](RESULTS/{name})):\n\n"
            + table(["", *cells], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"


def pass_speed() -> str:
    """PaSS: tokens per second as ratios within a text."""
    parts = []
    for name, result in _pass_results("speed"):
        cells = result["speed"]
        rows = []
        for key in next(iter(cells.values())):
            row = [f"`{key}`"]
            for found in cells.values():
                ratio = found[key]["over_autoregressive"]
                row.append(
                    f"{ratio['median']:.2f}x ({ratio['range'][0]:.2f}-{ratio['range'][1]:.2f}), "
                    f"{found[key]['tokens_per_step']:.2f}"
                )
            rows.append(row)
        parts.append(
            f"{result['model']}, {result['dtype']}, batch 1, {result['processes']} processes at a time, "
            f"{result['machine']}, commit {result['commit']}: tokens/s over plain decoding's in the same text, median and "
            f"range over texts; tokens/step ([{name}](RESULTS/{name})):\n\n" + table(["", *cells], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"

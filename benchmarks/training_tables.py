"""The tables of what training reached: translation, parsing, UltraFastBERT."""

import statistics

from benchmarks.result_files import Result, load_results, table

__all__ = [
    "arm_name",
    "arm_rows",
    "parsing_quality",
    "training_rate",
    "translation_quality",
    "translation_speed",
    "ultrafastbert_quality",
]


def translation_quality() -> str:
    """BLEU of every finished translation run, by weights and search."""
    parts = []
    for name, result in load_results("translation-quality"):
        rows, signatures = [], set()
        for run in result["runs"]:
            for title, ways in run["scores"].items():
                for way, found in ways.items():
                    low, high = found["bleu_interval"]
                    signatures |= {found["signatures"]["bleu"], found["signatures"]["bleu_lowercased"]}
                    rows.append(
                        [
                            f"{run['run']}: {title}, {way}",
                            f"{found['bleu']:.2f} ({low:.1f}-{high:.1f})",
                            f"{found['bleu_lowercased']:.2f}",
                            f"{found['chrf']:.1f}",
                            f"{run['training_seconds']:.0f} s",
                        ]
                    )
        parts.append(
            f"English to German, {result['machine']}, commit {result['commit']} ([{name}](RESULTS/{name})); "
            f"{' and '.join(f'`{signature}`' for signature in sorted(signatures))}; 95% bootstrap intervals; "
            f"{result['at_once']} of the runs trained at a time on the one device:\n\n"
            + table(["run: test set, weights, search", "BLEU", "lowercased", "chrF", "training"], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"


def parsing_quality() -> str:
    """Bracket scores of finished parsing runs."""
    parts = []
    for name, result in load_results("parsing-quality"):
        rows = [
            [
                f"{run['run']}: {title}, {way}",
                *(f"{found[score]:.1f}" for score in ("precision", "recall", "f1", "exact")),
                f"{run['training_seconds']:.0f} s",
            ]
            for run in result["runs"]
            for title, ways in run["scores"].items()
            for way, found in ways.items()
        ]
        parts.append(
            f"{result['runs'][0]['parameters']:,} parameters, {result['machine']}, commit {result['commit']} "
            f"([{name}](RESULTS/{name})):\n\n"
            + table(
                ["run: test set, weights, search", "precision", "recall", "F1", "exact trees %", "training"],
                rows,
            )
        )
    return "\n".join(parts) or "Not measured yet.\n"


def training_rate() -> str:
    """The share of the matrix rate that training reaches."""
    parts = []
    for name, result in load_results("transformer-training-rate"):
        rows = [
            [
                f"{row['preset']}, {'compiled' if row['compiled'] else 'eager'}",
                f"{row['step_ms']['median']:.1f} ms",
                f"{row['target_tokens_per_second']:,.0f}",
                f"{100 * row['share_of_matrix_rate']:.1f}%",
            ]
            for row in result["rows"]
        ]
        parts.append(
            f"{result['tokens']:,} source and target tokens a batch, {result['dtype']}, {result['machine']}, whose "
            f"measured matrix rate is {result['matrix_rate_flops'] / 1e12:.0f} TFLOP/s, commit {result['commit']} "
            f"([{name}](RESULTS/{name})):\n\n"
            + table(["", "a step", "target tokens/s", "of the matrix rate"], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"


def translation_speed() -> str:
    """Decoding beside MarianMT with the same weights."""
    parts = []
    for name, result in load_results("translation-speed"):
        rows = [
            [
                f"beam {row['beam']}, batch {row['rows']}",
                f"{row['ours']['tokens_per_second']:,.0f}",
                f"{row['marian']['tokens_per_second']:,.0f}",
                f"{row['ratio']['median']:.2f}x ({row['ratio']['range'][0]:.2f}-{row['ratio']['range'][1]:.2f})",
                f"{row['differing']} of {row['sentences']}",
            ]
            for row in result["rows"]
        ]
        parts.append(
            f"{result['model']}, {result['dtype']}, {result['machine']}, commit {result['commit']} "
            f"([{name}](RESULTS/{name})), against MarianMT with the same weights through `generate`:\n\n"
            + table(["", "tokens/s", "MarianMT", "ratio", "texts that differ"], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"


def arm_name(arm: Result) -> str:
    """`fff-1x11`, or `fff-1x11 balance 0.1`."""
    balance = arm["recipe"].get("balance")
    return arm["feedforward"] + (f" balance {balance:g}" if balance else "")


def arm_rows(result: Result) -> list[list[str]]:
    """A row for each arm of an UltraFastBERT comparison."""
    gaps = {paired["runs"][1]: paired for paired in result["paired"]}
    rows = []
    for arm in result["arms"]:
        gap, boolq = gaps.get(arm["run"]), arm.get("boolq")
        low, high = (100 * value for value in boolq["interval"]) if boolq else (0.0, 0.0)
        dead = [layer["dead_nodes"] for layer in arm["routing"]]
        rows.append(
            [
                arm_name(arm),
                f"{arm['active_neurons']:,} of {arm['neurons']:,}",
                f"{arm['parameters'] / 1e6:.1f} M",
                f"{arm['held_out']['perplexity']:.2f}",
                f"{gap['loss_difference']:+.3f} ({gap['interval'][0]:+.3f} to {gap['interval'][1]:+.3f})"
                if gap
                else "",
                f"{statistics.mean(dead):.0%}" if dead else "",
                f"{100 * boolq['mean']:.1f}% ({low:.1f}-{high:.1f})" if boolq else "",
                f"{arm['training_seconds']:.0f} s",
            ]
        )
    return rows


def ultrafastbert_quality() -> str:
    """The arms of every UltraFastBERT comparison, the baseline first."""
    parts = []
    for name, result in load_results("ultrafastbert-quality"):
        majority = next(
            (100 * arm["boolq"]["majority_rate"] for arm in result["arms"] if "boolq" in arm), None
        )
        parts.append(
            f"{result['machine']}, commit {result['commit']} ([{name}](RESULTS/{name})); "
            f"{result['arms'][0]['tokens'] / 1e6:.0f} million tokens an arm, "
            f"{result['at_once']} at once on a card; 95% intervals"
            + (f"; BoolQ's majority class is {majority:.1f}%" if majority is not None else "")
            + ":\n\n"
            + table(
                [
                    "feedforward",
                    "neurons a token uses",
                    "parameters",
                    "perplexity",
                    "nats a token over the first",
                    "nodes that no token reached",
                    "BoolQ, mean of the seeds",
                    "training",
                ],
                arm_rows(result),
            )
        )
    return "\n".join(parts) or "Not measured yet.\n"

"""Rewrite the tables of README and docs from `benchmarks/results` (`make results`); `--check` only says what is stale.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

Result = dict[str, Any]


def load_results(benchmark: str, folder: Path = RESULTS) -> list[tuple[str, Result]]:
    """(file name, content) of a benchmark's result files."""
    found = [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [(name, result) for name, result in found if result.get("benchmark") == benchmark]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def exactness() -> str:
    """How many texts are equal to plain decoding's, by precision and strategy."""
    parts = []
    for name, result in load_results("exactness"):
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
                rows.append([f"`{strategy}`", kind, f"{total['equal']} of {total['texts']}", worst or "-"])
        parts.append(
            f"{result['model']}, {result['dtype']}, MT-Bench prompts, texts equal to plain decoding's "
            f"({result['machine']}, commit {result['commit']}, [{name}](RESULTS/{name})):\n\n"
            + table(["against", "", "equal", "where they part"], rows)
        )
    return "\n".join(parts)


def tokens_per_step() -> str:
    """Tokens per step of each strategy on MT-Bench, fp32."""
    parts = []
    for name, result in load_results("exactness"):
        rows = [
            [f"`{strategy}`", f"{total['tokens_per_step']:.2f}"]
            for strategy, total in result["greedy"].items()
            if strategy != "transformers"
        ]
        parts.append(
            f"{result['model']}, {result['dtype']}, greedy, MT-Bench, commit {result['commit']} "
            f"([{name}](RESULTS/{name}); the paper's "
            "7B model with window 15, n-gram 5, guesses 15: 1.96, with prompt pool 2.05):\n\n"
            + table(["strategy", "tokens/step"], rows)
        )
    return "\n".join(parts)


def speed() -> str:
    """Tokens per second of each strategy, as ratios within one run."""
    parts = []
    for name, result in load_results("speed"):
        rows = []
        for contender, row in result["contenders"].items():
            plain, theirs = row["over_autoregressive"], row["over_best_transformers"]
            rows.append(
                [
                    f"`{contender}`" if not contender.startswith("transformers") else contender,
                    f"{row['tokens_per_step']:.2f}",
                    f"{row['tokens_per_second']:.1f}",
                    f"{plain['median']:.2f}x ({plain['range'][0]:.2f}-{plain['range'][1]:.2f})",
                    f"{theirs['median']:.2f}x",
                ]
            )
        parts.append(
            f"{result['model']}, {result['dtype']}, batch 1, greedy, MT-Bench + GSM8K + HumanEval, "
            f"{result['machine']}, commit {result['commit']} "
            f"([{name}](RESULTS/{name})); ratios are medians over rounds of one run:\n\n"
            + table(["", "tokens/step", "tokens/s", "over plain", "over transformers' best"], rows)
        )
    return "\n".join(parts)


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
    return "\n".join(parts)


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
    return "\n".join(parts)


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
    return "\n".join(parts)


TABLES: Mapping[str, Callable[[], str]] = {
    "exactness": exactness,
    "tokens-per-step": tokens_per_step,
    "speed": speed,
    "translation-quality": translation_quality,
    "training-rate": training_rate,
    "translation-speed": translation_speed,
}


def rewritten(path: Path) -> str:
    """The page with its tables made anew."""
    depth = len(path.relative_to(ROOT).parts) - 1
    results = "../" * depth + "benchmarks/results"

    def fill(match: re.Match[str]) -> str:
        return match[1] + TABLES[match[2]]().replace("RESULTS/", f"{results}/") + match[4]

    return _BLOCK.sub(fill, path.read_text())


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a table is stale"
    )
    check = arguments.parse_args().check
    stale = [path for path in pages() if rewritten(path) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale' if check else 'rewritten'}")
        if not check:
            path.write_text(rewritten(path))
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()

"""Rewrite the tables of README and docs from `benchmarks/results` (`make results`); `--check` only says what is stale.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.decoding_tables import (
    draft_width,
    exactness,
    pass_controls,
    pass_speed,
    pass_steps,
    speed,
    tokens_per_step,
)
from benchmarks.fast_feedforward_tables import (
    fast_feedforward_cpu,
    fast_feedforward_gpu,
    fast_feedforward_model,
)
from benchmarks.result_files import Result, load_results, table
from benchmarks.training_tables import (
    parsing_quality,
    training_rate,
    translation_quality,
    translation_speed,
    ultrafastbert_quality,
)

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def quantization() -> str:
    """Perplexity of each weight type on text and weights that were never quantised."""
    parts = []
    for name, result in load_results("quantization"):
        rows = []
        for setting, row in result["settings"].items():
            low, high = row["interval_95_percent"]
            change = f"{row['over_bfloat16_percent']:+.2f}% ({low:+.2f} to {high:+.2f})"
            rows.append([setting, f"{row['perplexity']:.3f}", "" if setting == "bfloat16" else change])
        tokens = result["training"]["tokens"]
        parts.append(
            f"A 17M-parameter Llama trained on {tokens / 1e6:.1f}M tokens of English, on the {result['tokens']:,} tokens "
            f"behind them; 95% bootstrap intervals (commit {result['commit']}, [{name}](RESULTS/{name})):\n\n"
            + table(["weights", "perplexity", "against bfloat16"], rows)
        )
    return "\n".join(parts)


def quantization_quality() -> str:
    """Rounding to the nearest, clipping and GPTQ side by side."""
    parts = []
    for name, result in load_results("quantization-quality"):
        for label, measured in result["models"].items():
            rows = []
            for setting, row in measured["settings"].items():
                low, high = row["interval_95_percent"]
                change = f"{row['change_percent']:+.2f}% ({low:+.2f} to {high:+.2f})"
                took = f"{row['seconds_to_quantise']:.1f} s"
                rows.append(
                    [setting, f"{row['perplexity']:.3f}", *(["", ""] if not rows else [change, took])]
                )
            origin = f"Weights {label}"
            if "training" in measured:
                origin += f" in float32 on {measured['training']['tokens'] / 1e6:.1f}M tokens of English"
            parts.append(
                f"{origin} (`{Path(measured['model']).name}`, {measured['parameters'] / 1e6:.0f}M parameters), on "
                f"{measured['tokens']:,} tokens never trained on here, {result['machine']}, commit {result['commit']} "
                f"([{name}](RESULTS/{name})); 95% bootstrap intervals over windows of {result['window']}; GPTQ sees "
                f"{result['calibration_windows']} other windows:\n\n"
                + table(["weights", "perplexity", "against float32", "to quantise"], rows)
            )
    return "\n".join(parts) or "Not measured yet.\n"


def weight_streaming() -> str:
    """How near a one-row step of a 1B-shaped model comes to the memory's rate."""
    parts = []
    for name, result in load_results("weight_streaming"):
        rows = [
            [
                setting,
                f"{row['weight_bytes'] / 1e6:,.0f} MB",
                f"{row['t1_ms']:.1f} ms",
                f"{row['share_of_read_rate']:.0%} ({row['share_range'][0]:.0%}-{row['share_range'][1]:.0%})",
                f"{row['t16_ms'] / row['t1_ms']:.2f}",
            ]
            for setting, row in result["settings"].items()
        ]
        parts.append(
            f"{result['shape']}, random weights that no cache holds, {result['machine']}, commit {result['commit']} "
            f"([{name}](RESULTS/{name})):\n\n"
            + table(["weights", "read a step", "t(1)", "of the memory's read rate", "t(16) / t(1)"], rows)
        )
    return "\n".join(parts)


def llama_cpp() -> str:
    """Steps, prefill and tokens per second beside llama.cpp on the same files, as ratios within one run."""
    parts = []
    for name, result in load_results("llama_cpp"):
        kinds = result["types"]

        def cell(row: Result) -> str:
            return f"{row['median']:.2f}x ({row['range'][0]:.2f}-{row['range'][1]:.2f})"

        rows = [
            [label, *(cell(kinds[kind]["ratios"][key]) for kind in kinds)]
            for label, key in [
                ("plain decoding, tokens/s", "plain"),
                ("`auto`, over llama.cpp's plain decoding", "auto over their plain"),
                ("`auto`, over our plain decoding", "auto over our plain"),
                ("drafting against its prompt lookup", "drafts"),
                ("prefill of 512 tokens", "prefill"),
                ("a step of 1 row", "t(1)"),
                ("of 16 rows", "t(16)"),
                ("of 64 rows", "t(64)"),
            ]
        ]
        ours = {kind: kinds[kind]["median_ms"]["shoestring"] for kind in kinds}
        for count in ("8", "16", "32", "64"):
            rows.append(
                [f"our t({count}) / t(1)", *(f"{ours[kind][count] / ours[kind]['1']:.2f}" for kind in kinds)]
            )
        fresh = {kind: kinds[kind]["fresh_process"] for kind in kinds}
        for engine in ("shoestring", "llama.cpp"):
            rows.append(
                [
                    f"{engine}: seconds to load",
                    *(f"{fresh[kind][engine]['load_seconds']:.2f}" for kind in kinds),
                ]
            )
            rows.append(
                [
                    f"{engine}: resident MB beyond imports (file: MB)",
                    *(
                        f"{fresh[kind][engine]['resident_growth'] / 1e6:.0f} ({kinds[kind]['file_bytes'] / 1e6:.0f})"
                        for kind in kinds
                    ),
                ]
            )
        parts.append(
            f"{result['model']}, batch 1, greedy, {result['machine']}, llama-cpp-python {result['llama_cpp_python']}, "
            f"commit {result['commit']} ([{name}](RESULTS/{name})); above 1x we are faster, medians over "
            f"{result['rounds']} interleaved rounds of one run:\n\n" + table(["", *kinds], rows)
        )
    return "\n".join(parts)


def gpu_step_cost() -> str:
    """A step on a GPU by its rows, beside the time to read the weights."""
    parts = []
    for name, result in load_results("gpu-step-cost"):
        for subject in result["subjects"]:
            twin = {row["rows"]: row["step_ms"]["median"] for row in subject.get("twin", ())}
            rows = [
                [
                    f"{row['rows']} rows, {row['slots']} sequence{'s' * (row['slots'] > 1)}",
                    f"{row['replay_ms']['median']:.2f} ms",
                    f"{row['step_ms']['median']:.2f} ms",
                    f"{twin[row['rows']]:.1f} ms" if row["slots"] == 1 and row["rows"] in twin else "-",
                ]
                for row in subject["rows"]
            ]
            parts.append(
                f"{subject['subject']}'s shape, {subject['weights']}, {result['context']} tokens cached, "
                f"{result['machine']}, commit {result['commit']} ([{name}](RESULTS/{name})); reading the weights at the "
                f"measured {result['read_bytes_per_second'] / 1e12:.2f} TB/s takes {subject['floor_ms']:.2f} ms:\n\n"
                + table(["", "the graph", "with the host", "transformers' modules"], rows)
            )
    return "\n".join(parts) or "Not measured yet.\n"


def few_row_matmul() -> str:
    """A step's products by type of weights and rows, beside PyTorch's."""
    parts = []
    for name, result in load_results("few_row_matmul"):
        rows = []
        for step in result["steps"]:
            of_step = [
                row for row in result["table"]
                if all(row[key] == step[key] for key in ("model", "type", "rows"))
            ]  # fmt: skip
            shares = [100 * row["share"] for row in of_step]
            theirs = step.get("torch_step_us")
            rows.append(
                [
                    f"{step['model']}, {step['type']}, {step['rows']} rows",
                    f"{step['step_us'] / 1e3:.2f} ms",
                    f"{theirs / 1e3:.2f} ms" if theirs else "-",
                    f"{min(shares):.0f}-{max(shares):.0f}%",
                ]
            )
        header = ["", "a step's products", "PyTorch's (bfloat16)", "of the read rate, by product"]
        parts.append(
            f"{result['machine']}, commit {result['commit']} ([{name}](RESULTS/{name})); it reads "
            f"{result['read_tb_per_second']:.2f} TB/s:\n\n" + table(header, rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"


TABLES: Mapping[str, Callable[[], str]] = {
    "draft-width": draft_width,
    "exactness": exactness,
    "exactness-gpu": partial(exactness, ("bfloat16",)),
    "tokens-per-step": tokens_per_step,
    "speed": speed,
    "speed-gpu": partial(speed, "nvidia", all_batches=True),
    "pass-steps": pass_steps,
    "pass-controls": pass_controls,
    "pass-speed": pass_speed,
    "fast-feedforward-cpu": fast_feedforward_cpu,
    "fast-feedforward-gpu": fast_feedforward_gpu,
    "fast-feedforward-model": fast_feedforward_model,
    "gpu-step-cost": gpu_step_cost,
    "few-row-matmul": few_row_matmul,
    "llama-cpp": llama_cpp,
    "quantization": quantization,
    "quantization-quality": quantization_quality,
    "weight-streaming": weight_streaming,
    "translation-quality": translation_quality,
    "ultrafastbert-quality": ultrafastbert_quality,
    "parsing-quality": parsing_quality,
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

"""Tokens per second of greedy and beam decoding beside HF's MarianMT with the same weights through HF `generate`.

Both sides get the same batches of the same token ids and write the same tokens (the count of texts that differ is
printed); they take turns, and ratios are within one run. `--model` is a run folder of a paper-style model, or a preset,
which is then given random weights: no text ends before its limit (24 source tokens and 50 more).
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parser
from shoestring.evaluation.results import write_result
from shoestring.transformer.batching import padded
from shoestring.transformer.config import PRESETS, preset
from shoestring.transformer.corpus import read_corpus
from shoestring.transformer.marian import as_marian
from shoestring.transformer.model import Transformer
from shoestring.transformer.search import SearchOptions, search
from shoestring.transformer.translator import Translator


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments.add_argument("--rows", type=int, action="append", help="sentences a batch; default: 1, 32, 128")
    arguments.add_argument("--beam", type=int, action="append", help="default: 1 and 4")
    arguments.add_argument("--sentences", type=int, default=256, help="at most this many of the test set")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.set_defaults(model="paper-base")
    asked = arguments.parse_args()
    device = "cuda" if asked.device == "auto" and torch.cuda.is_available() else asked.device
    device = "cpu" if device == "auto" else device
    dtype = getattr(torch, asked.dtype)
    model, sentences = subject(asked, device, dtype)
    marian = as_marian(model)
    rows = []
    for beam in asked.beam or [1, 4]:
        for count in asked.rows or [1, 32, 128]:
            row = measure(model, marian, sentences, count, beam, asked, device)
            rows.append(row)
            print(
                f"beam {beam} rows {count:4}: ours {row['ours']['tokens_per_second']:9.0f} tokens/s, MarianMT "
                f"{row['marian']['tokens_per_second']:9.0f}, {row['ratio']['median']:.2f}x "
                f"({row['ratio']['range'][0]:.2f}-{row['ratio']['range'][1]:.2f}), {row['differing']} texts differ"
            )
    result = {
        "benchmark": "translation-speed",
        "model": asked.model,
        "parameters": model.num_parameters(),
        "dtype": asked.dtype,
        "repeats": asked.repeats,
        "rows": rows,
    }
    if asked.output:
        write_result(asked.output, result, device)
    print(json.dumps(result))


def subject(asked: Any, device: str, dtype: torch.dtype) -> tuple[Transformer, list[list[int]]]:
    """The model, and source token ids."""
    if asked.model not in PRESETS:
        translator = Translator.load(Path(asked.model), device, dtype)
        pairs = read_corpus(f"translation/multi30k.test_2016.{{}}[:{asked.sentences}]", ("en", "de"))
        return translator.model, translator.encode([source for source, _ in pairs])
    torch.manual_seed(0)
    model = Transformer(preset(asked.model, vocab_size=32000)).to(device=device, dtype=dtype).eval()
    with torch.no_grad():
        model.shared.weight[: len(("<pad>", "<s>", "</s>"))] = (
            0  # their logits are never the highest: no text ends
        )
    return model, torch.randint(3, 32000, (asked.sentences, 24)).tolist()


def measure(
    model: Transformer,
    marian: Any,
    sentences: list[list[int]],
    count: int,
    beam: int,
    asked: Any,
    device: str,
) -> dict[str, Any]:
    order = sorted(sentences, key=len)[-max(count, min(len(sentences), 8 * count)) :]
    batches = [
        padded(order[start : start + count], model.config.pad_token_id, device)
        for start in range(0, len(order), count)
    ][:4]
    options = SearchOptions(beam=beam, length_penalty=0.6)

    def ours() -> list[list[int]]:
        return [best[0].tokens for ids, mask in batches for best in search(model, ids, mask, options)]

    def theirs() -> list[list[int]]:
        written = []
        for ids, mask in batches:
            longest = int(mask.sum(1).max()) + options.extra_length
            extra = {"length_penalty": 0.6, "early_stopping": True} if beam > 1 else {}
            out = marian.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                num_beams=beam,
                do_sample=False,
                max_new_tokens=longest,
                **extra,
            )
            written += [[t for t in row[1:] if t > 2] for row in out.tolist()]
        return written

    texts = {"ours": ours(), "marian": theirs()}  # the warm-up
    seconds: dict[str, list[float]] = {"ours": [], "marian": []}
    for _ in range(asked.repeats):
        for name, side in (("ours", ours), ("marian", theirs)):
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    tokens = {name: sum(len(text) + 1 for text in side) for name, side in texts.items()}
    rates = {name: [tokens[name] / one for one in of] for name, of in seconds.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["marian"], strict=True)]
    total = sum(len(ids) for ids, _ in batches)
    return {
        "beam": beam,
        "rows": count,
        "sentences": total,
        "differing": sum(a != b for a, b in zip(texts["ours"], texts["marian"], strict=True)),
        "ratio": {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
        **{
            name: {
                "tokens_per_second": statistics.median(rates[name]),
                "sentences_per_second": total / statistics.median(seconds[name]),
                "tokens": tokens[name],
            }
            for name in rates
        },
    }


if __name__ == "__main__":
    main()

"""How much of the device's measured matrix rate a training step of the Transformer reaches, by preset, eager and compiled.

A step is forward, backward, clipping and AdamW on a batch of `--tokens` source and as many target tokens in sentences of
`--length` tokens, a third of them a twentieth shorter and padded, as in a bucket. Counted are the products of real tokens
only: padding, recomputation and element-wise work are not. The matrix rate is the best of a few square products.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import parser
from shoestring.evaluation.results import write_result
from shoestring.transformer.config import TransformerConfig, preset
from shoestring.transformer.model import Transformer


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--preset", action="append", help="default: paper-base and paper-big")
    arguments.add_argument("--tokens", type=int, default=25000)
    arguments.add_argument("--vocabulary", type=int, default=37000)
    arguments.add_argument("--length", type=int, default=28)
    arguments.add_argument("--steps", type=int, default=30)
    arguments.add_argument("--eager-only", action="store_true")
    asked = arguments.parse_args()
    device = "cuda" if asked.device == "auto" and torch.cuda.is_available() else asked.device
    device = "cpu" if device == "auto" else device
    rate = matrix_rate(device)
    print(f"matrix rate: {rate / 1e12:.2f} TFLOP/s (bf16)")
    rows = []
    for name in asked.preset or ["paper-base", "paper-big"]:
        for compiled in (False,) if asked.eager_only else (False, True):
            row = measure(name, compiled, device, asked)
            row["share_of_matrix_rate"] = row["flops_per_second"] / rate
            rows.append(row)
            print(
                f"{name:14} {'compiled' if compiled else 'eager':9} {row['step_ms']['median']:8.1f} ms a step "
                f"{row['target_tokens_per_second']:10.0f} target tokens/s {100 * row['share_of_matrix_rate']:5.1f}%"
            )
    result = {
        "benchmark": "transformer-training-rate",
        "dtype": "bfloat16 (autocast, fp32 weights)",
        "matrix_rate_flops": rate,
        "tokens": asked.tokens,
        "vocabulary": asked.vocabulary,
        "length": asked.length,
        "rows": rows,
    }
    if asked.output:
        write_result(asked.output, result, device)
    print(json.dumps(result))


def matrix_rate(device: str) -> float:
    """FLOP/s of the fastest of a few square bf16 products."""
    rates = []
    for size in (4096, 8192, 12288) if device == "cuda" else (1024,):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds = timed(lambda a=a, b=b: a @ b, device, 10)
        rates.append(2 * size**3 / statistics.median(seconds))
    return max(rates)


def measure(name: str, compiled: bool, device: str, asked: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = preset(name, vocab_size=asked.vocabulary)
    model = Transformer(config).to(device).train()
    if compiled:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=device == "cuda")
    inputs = batch(asked.length, asked.tokens, asked.vocabulary, device)
    began = time.perf_counter()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # compiles, and warms up
        step()
    synchronize(device)
    warm_up = time.perf_counter() - began
    samples = timed(step, device, asked.steps)
    seconds = statistics.median(samples)
    return {
        "preset": name,
        "compiled": compiled,
        "parameters": model.num_parameters(),
        "flops_per_second": training_flops(config, inputs) / seconds,
        "target_tokens_per_second": int((inputs["labels"] != -100).sum()) / seconds,
        "step_ms": {
            "median": 1e3 * seconds,
            "range": [1e3 * min(samples), 1e3 * max(samples)],
        },
        "warm_up_seconds": warm_up,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def batch(length: int, tokens: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    """Rows of `length`, of which each third row is a twentieth shorter."""
    rows = tokens // length
    ids = torch.randint(3, vocabulary, (rows, length), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::3, length - max(1, length // 20) :] = False
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(~mask, -100)}


def training_flops(config: TransformerConfig, inputs: dict[str, torch.Tensor]) -> float:
    """Products of a step: two operations a weight and token forward, twice that backward, and the attention's own."""
    width, heads = config.d_model, config.heads
    source = inputs["attention_mask"].sum(1).double()
    target = (inputs["labels"] != -100).sum(1).double()
    attention = width * heads * (2 * config.d_k + 2 * config.d_v)
    forward = width * config.d_ff * 2  # swiglu has three matrices of two thirds the width
    memory = width * heads * (config.d_k + config.d_v)  # a source token's keys and values for the decoder
    decoder = 2 * attention + forward - memory
    weights = config.layers * (source.sum() * (attention + forward + memory) + target.sum() * decoder)
    weights += target.sum() * width * config.vocab_size
    scores = source * source + target * (target + 1) / 2 + source * target
    mixing = config.layers * heads * (config.d_k + config.d_v) * scores.sum()
    return float(3 * 2 * (weights + mixing))


def timed(function: Callable[[], object], device: str, count: int) -> list[float]:
    function()
    samples = []
    for _ in range(count):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        samples.append(time.perf_counter() - began)
    return samples


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

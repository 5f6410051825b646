"""The cost of a step on a GPU by its number of rows: the fused step, by type of weights, beside the bandwidth floor.

`step_ms` is what decoding waits for: from the tree on the host to the next tokens on the host. `replay_ms` is the CUDA
graph alone. The floor is the time to read the matrices once at the measured read rate. `7b` is Llama-2-7B's shape, `8b`
Llama-3-8B's (Mistral-7B has its layers) and `135m` SmolLM2's, with random weights: for timing only. With --twin,
transformers' modules behind the same runner protocol are timed too.

    python -m benchmarks.gpu_step_cost --subject smollm2-135m --subject 7b --quantize none --quantize int4
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import parser
from shoestring.evaluation.results import write_result

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--subject", action="append", help="a model's name, 7b, 8b or 135m; default: the default model"
    )
    arguments.add_argument("--quantize", action="append", help="none, int8 or int4; default: none")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--rows", type=int, action="append", help="default: 1, 2, 4, ..., 256")
    arguments.add_argument(
        "--slots", type=int, action="append", help="sequences that share the rows; default: 1"
    )
    arguments.add_argument("--context", type=int, default=512)
    arguments.add_argument("--repeats", type=int, default=30)
    arguments.add_argument("--twin", action="store_true")
    asked = arguments.parse_args()
    rate = read_rate()
    print(f"read rate: {rate / 1e12:.2f} TB/s", flush=True)
    subjects = []
    for name in asked.subject or [asked.model]:
        for quantize in asked.quantize or ["none"]:
            subjects.append(measure(name, None if quantize == "none" else quantize, rate, asked))
            torch.cuda.empty_cache()
    result = {
        "benchmark": "gpu-step-cost",
        "dtype": asked.dtype,
        "context": asked.context,
        "read_bytes_per_second": rate,
        "subjects": subjects,
    }
    if asked.output:
        write_result(asked.output, result, "cuda")
    print(json.dumps(result))


def module_of(name: str, dtype: torch.dtype) -> torch.nn.Module:
    if name not in SHAPES:
        from shoestring import hub

        return hub.load_pretrained(name, dtype=str(dtype).removeprefix("torch."), device="cuda").model
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[name])).eval()
    finally:
        torch.set_default_dtype(before)


def measure(name: str, quantize: str | None, rate: float, asked: Any) -> dict[str, Any]:
    from shoestring.engine.cuda import cuda_runner_of
    from shoestring.engine.hf_runner import HFRunner

    module = module_of(name, getattr(torch, asked.dtype))
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    runner = cuda_runner_of(module, quantize=quantize)
    loaded = time.perf_counter() - began
    weight_bytes = runner.weight_bytes
    floor = weight_bytes / rate
    found: dict[str, Any] = {
        "subject": name,
        "weights": runner.weights,
        "weight_bytes": weight_bytes,
        "floor_ms": 1e3 * floor,
        "load_seconds": loaded,
        "rows": [],
    }
    counts = asked.rows or [1, 2, 4, 8, 16, 32, 64, 128, 256]
    before = torch.cuda.memory_allocated()
    for slots in asked.slots or [1]:
        prepare(runner, slots, asked.context)
        for rows in counts:
            if rows % slots:
                continue
            trees = {slot: binary_tree(rows // slots, runner.vocab_size) for slot in range(slots)}
            step = timed(lambda trees=trees: take(runner, trees), asked.repeats)
            graph = runner.steps.get(slots, rows, 1)
            replay = timed_replay(graph, asked.repeats)
            found["rows"].append({"slots": slots, "rows": rows, "step_ms": step, "replay_ms": replay})
            print(
                f"{name:14} {runner.weights:9} slots {slots} rows {rows:4}: step {step['median']:.3f} ms, graph "
                f"{replay['median']:.3f} ms, floor {1e3 * floor:.3f}",
                flush=True,
            )
        for slot in range(slots):
            runner.release(slot)
        runner.clear()
    found["capture_seconds"] = runner.steps.capture_seconds
    found["graphs"] = len(runner.steps)
    found["graph_bytes"] = torch.cuda.memory_allocated() - before
    found["buffer_bytes"] = runner.steps.nbytes
    if asked.twin and quantize is None:
        twin = HFRunner(module)
        prepare(twin, 1, asked.context)
        found["twin"] = []
        for rows in counts:
            tree = binary_tree(rows, twin.vocab_size)
            step = timed(lambda tree=tree: take(twin, {0: tree}), max(5, asked.repeats // 3))
            found["twin"].append({"rows": rows, "step_ms": step})
            print(f"{name:14} transformers' modules rows {rows:4}: step {step['median']:.3f} ms", flush=True)
        twin.release(0)
        twin.close()
    runner.close()
    return found


def prepare(runner: Any, slots: int, context: int) -> None:
    from shoestring.engine.runner import Outputs
    from shoestring.engine.sampling import SamplingOptions
    from shoestring.engine.tokentree import TokenTree

    for slot in range(slots):
        tokens = [(7919 * index + 31 * slot + 11) % runner.vocab_size for index in range(context)]
        runner.open(slot, SamplingOptions())
        runner.step({slot: TokenTree.chain(tokens)}, Outputs({slot: []}))
        runner.commit({slot: range(context)})


def binary_tree(rows: int, vocabulary: int) -> Any:
    from shoestring.engine.tokentree import TokenTree

    tokens = [(104729 * row + 3) % vocabulary for row in range(rows)]
    return TokenTree(tokens, [-1, *((row - 1) // 2 for row in range(1, rows))])


def take(runner: Any, trees: Any) -> None:
    results = runner.step(trees)
    for slot in trees:
        results[slot].next_token(0)


def timed(function: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Milliseconds: median and range, after a warm-up that captures."""
    for _ in range(4):
        function()
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        samples.append(1e3 * (time.perf_counter() - began))
    return {"median": statistics.median(samples), "range": [min(samples), max(samples)]}


def timed_replay(step: Any, repeats: int) -> dict[str, Any]:
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step.run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return {"median": statistics.median(samples), "range": [min(samples), max(samples)]}


def read_rate() -> float:
    """Bytes per second of summing 8 GiB."""
    data = torch.ones(1 << 31, dtype=torch.float32, device="cuda")
    samples = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        data.sum()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return data.nbytes / min(samples)


if __name__ == "__main__":
    main()

"""How near a one-row step of a model that no cache holds comes to the memory's rate: a 1B-shaped model, random weights.

Each round times one-row and sixteen-row steps of each weight type, and a plain read of memory with as many threads: the
weights' bytes over the step's time, against the read rate of the same round. Medians over rounds.

    python -m benchmarks.weight_streaming --output benchmarks/results/weight_streaming.cpu-2threads-avx512_bf16.json
"""

import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import parser
from shoestring import _native
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.native_weights import NativeConfig
from shoestring.engine.runner import Outputs
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.evaluation.results import write_result
from shoestring.quantization import WeightMatrix, pack, weight_type_for

LAYERS, HIDDEN, WIDTH, HEADS, KV_HEADS, DIM, VOCABULARY = 16, 2048, 8192, 32, 8, 64, 32_000
SETTINGS = {"bfloat16": None, "int8": "int8", "int4": "int4"}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--context", type=int, default=64)
    options = arguments.parse_args()
    threads = _native.available_processors()
    rows: dict[str, Any] = {}
    for name, quantize in SETTINGS.items():
        matrices = weights(quantize)
        runner = NativeRunner(config(), matrices, threads=threads)
        # The embedding is also the head, so every byte is read once a step.
        nbytes = sum(_native.matrix_bytes(int(m.type), m.rows, m.cols) for m in matrices.values())
        rows[name] = measure(runner, nbytes, options.rounds, options.context, threads)
        print(name, rows[name], flush=True)
        runner.close()
        del runner, matrices
    result = {
        "benchmark": "weight_streaming",
        "threads": threads,
        "instruction_set": _native.instruction_sets()[-1],
        "shape": f"{LAYERS} layers, {HIDDEN} wide, feedforward {WIDTH}, {HEADS} heads, {KV_HEADS} key-value heads",
        "rounds": options.rounds,
        "settings": rows,
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, "cpu")


def config() -> NativeConfig:
    frequencies = (1 / 10000.0 ** (np.arange(DIM // 2) * 2 / DIM)).astype(np.float32)
    return NativeConfig(
        hidden_size=HIDDEN, num_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, intermediate_size=WIDTH,
        vocab_size=VOCABULARY, norm_epsilon=1e-5, windows=(0,) * LAYERS, ropes=((frequencies, 1.0),),
        layer_ropes=(0,) * LAYERS, attention_scale=DIM**-0.5, max_positions=4096,
    )  # fmt: skip


def weights(quantize: str | None) -> dict[str, WeightMatrix]:
    """Random weights; every layer has its own memory."""
    shapes = {
        "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN), "self_attn.k_proj.weight": (KV_HEADS * DIM, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * DIM, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        "mlp.gate_proj.weight": (WIDTH, HIDDEN), "mlp.up_proj.weight": (WIDTH, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, WIDTH),
        "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    torch.manual_seed(0)

    def random(name: str, shape: tuple[int, ...]) -> WeightMatrix:
        values = torch.randn(shape) * 0.02 if len(shape) == 2 else torch.ones(shape)
        return pack(values, weight_type_for(name, shape, quantize))

    layer = {name: random(name, shape) for name, shape in shapes.items()}
    matrices = {
        f"layers.{index}.{name}": WeightMatrix(m.type, m.rows, m.cols, np.array(m.data))
        for index in range(LAYERS)
        for name, m in layer.items()
    }
    matrices["embed_tokens.weight"] = random("embed_tokens.weight", (VOCABULARY, HIDDEN))
    matrices["norm.weight"] = random("norm.weight", (HIDDEN,))
    return matrices


def measure(runner: NativeRunner, nbytes: int, rounds: int, context: int, threads: int) -> dict[str, Any]:
    runner.open(0, SamplingOptions())
    prompt = [(11 * i + 5) % VOCABULARY for i in range(context)]
    runner.step({0: TokenTree.chain(prompt)}, Outputs({0: [context - 1]}))
    runner.commit({0: range(context)})
    seconds: dict[int, list[float]] = {1: [], 16: []}
    shares, rates = [], []
    for _ in range(rounds):
        rates.append(_native.read_bandwidth(1 << 30, threads))
        for count, times in seconds.items():
            tree = TokenTree.chain(prompt[:count])
            best = float("inf")
            for _ in range(3):
                began = time.perf_counter()
                runner.step({0: tree})[0].argmax(0)
                best = min(best, time.perf_counter() - began)
            times.append(best)
        shares.append(nbytes / seconds[1][-1] / rates[-1])
    runner.release(0)
    return {
        "weight_bytes": nbytes,
        "read_gb_per_second": round(statistics.median(rates) / 1e9, 1),
        "t1_ms": round(1e3 * statistics.median(seconds[1]), 2),
        "t16_ms": round(1e3 * statistics.median(seconds[16]), 2),
        "share_of_read_rate": round(statistics.median(shares), 3),
        "share_range": [round(min(shares), 3), round(max(shares), 3)],
    }


if __name__ == "__main__":
    main()

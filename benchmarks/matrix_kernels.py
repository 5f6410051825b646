"""Few-row products with quantised weights: time, GB/s of weights and GFLOP/s, by type and number of rows T.

Weights come from copies that no cache holds, in turn. Contenders are interleaved; medians and ranges are over rounds.
On one thread and, over halves of the rows, on two. Beside them torch's bf16 linear, and `read`: what merely summing
as many bytes costs in numpy.

    python -m benchmarks.matrix_kernels --output benchmarks/results/matrix_kernels.cpu-2threads-avx512_vnni.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from shoestring import _native
from shoestring.evaluation.results import write_result

TYPES = {
    "int8_tiles": 1001, "int4_tiles": 1002, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q4_k": 12, "q5_k": 13, "q6_k": 14, "f16": 1,
}  # fmt: skip


class Weights:
    """Copies of one matrix, more than a cache holds, taken in turn."""

    def __init__(self, name: str, rows: int, cols: int, total_bytes: int) -> None:
        self.kind, self.rows, self.cols = TYPES[name], rows, cols
        generator = np.random.default_rng(0)
        self.nbytes = _native.quantized_matrix_bytes(self.kind, rows, cols)
        if name.endswith("tiles"):
            data = np.empty(self.nbytes, np.uint8)
            _native.quantized_pack(self.kind, generator.standard_normal((rows, cols), dtype=np.float32), data)
        elif name == "f16":
            data = generator.standard_normal((rows, cols)).astype(np.float16).view(np.uint8).ravel()
        else:
            block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)][1]
            data = generator.integers(0, 256, (self.nbytes // block, block), dtype=np.uint8)
            for at in {14: [208], 2: [0], 8: [0]}.get(self.kind, [0, 2]):  # scales that are numbers
                data[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            data = data.ravel()
        self.copies = [aligned_copy(data) for _ in range(max(1, total_bytes // self.nbytes))]
        self.turn = 0

    def next(self) -> np.ndarray:
        self.turn = (self.turn + 1) % len(self.copies)
        return self.copies[self.turn]


def aligned_copy(data: np.ndarray) -> np.ndarray:
    memory = np.empty(len(data) + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + len(data)] = data
    return memory[start : start + len(data)]


def products(
    weights: Weights, isa: str, steps: int, threads: int, pool: ThreadPoolExecutor
) -> Callable[[], None]:
    x = np.random.default_rng(1).standard_normal((steps, weights.cols), dtype=np.float32)
    prepared = aligned_copy(
        np.zeros(_native.quantized_prepared_bytes(weights.kind, isa, weights.cols) * steps, np.uint8)
    )
    _native.quantized_prepare(weights.kind, isa, x, prepared)
    y = np.empty((steps, weights.rows), np.float32)

    def part(data: np.ndarray, first: int, last: int) -> None:
        _native.quantized_multiply(
            weights.kind, isa, data, weights.rows, weights.cols, prepared, first, last, y
        )

    def run() -> None:
        data = weights.next()
        if threads == 1:
            part(data, 0, weights.rows)
        else:
            half = weights.rows // 32 * 16
            other = pool.submit(part, data, half, weights.rows)
            part(data, 0, half)
            other.result()

    return run


def timed(run: Callable[[], None]) -> float:
    run()  # the code and the activations are warm, the weights are not
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=4096)
    arguments.add_argument("--cols", type=int, default=4096)
    arguments.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128])
    arguments.add_argument("--types", nargs="*", default=list(TYPES))
    arguments.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    arguments.add_argument("--isa", default=_native.available_instruction_sets()[-1])
    arguments.add_argument(
        "--megabytes", type=int, default=512, help="of weights of each type, over all copies"
    )
    arguments.add_argument("--calls", type=int, default=15)
    arguments.add_argument("--no-torch", action="store_true")
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    rows, cols, total = options.rows, options.cols, options.megabytes << 20
    pool = ThreadPoolExecutor(1)
    # (type, threads, T, bytes of weights, one product)
    contenders: list[tuple[str, int, int, int, Callable[[], None]]] = []

    buffer = np.ones(total // 8, np.int64)
    for threads in options.threads:
        halves = np.array_split(buffer, threads)

        def read(halves: list[np.ndarray] = halves) -> None:
            others = [pool.submit(np.sum, half) for half in halves[1:]]
            np.sum(halves[0])
            for other in others:
                other.result()

        contenders.append(("read", threads, 0, total, read))
    for name in options.types:
        weights = Weights(name, rows, cols, total)
        for threads in options.threads:
            for steps in options.steps:
                run = products(weights, options.isa, steps, threads, pool)
                contenders.append((name, threads, steps, weights.nbytes, run))
    if not options.no_torch:
        linears = [torch.randn(rows, cols).bfloat16() for _ in range(max(1, total // (2 * rows * cols)))]
        for threads in options.threads:
            for steps in options.steps:
                x, turn = torch.randn(steps, cols).bfloat16(), iter(range(1 << 30))

                def linear(x: torch.Tensor = x, turn: Any = turn) -> None:
                    torch.nn.functional.linear(x, linears[next(turn) % len(linears)])

                contenders.append(("torch bf16", threads, steps, 2 * rows * cols, linear))
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(options.calls):
        for index, (_, threads, _, _, run) in enumerate(contenders):
            torch.set_num_threads(threads)
            seconds[index].append(timed(run))
    table = []
    for (name, threads, steps, nbytes, _), times in zip(contenders, seconds, strict=True):
        median = statistics.median(times)
        table.append({
            "type": name, "threads": threads, "T": steps, "ms": round(1000 * median, 3),
            "ms_range": [round(1000 * min(times), 3), round(1000 * max(times), 3)],
            "GB/s": round(nbytes / median / 1e9, 2), "GFLOP/s": round(2 * rows * cols * steps / median / 1e9, 1),
        })  # fmt: skip
        print(
            "{type:11} {threads} thread(s) T={T:<4} {ms:9.3f} ms {GB/s:6.2f} GB/s {GFLOP/s:7.1f} GFLOP/s".format_map(
                table[-1]
            )
        )
    result = {"benchmark": "matrix_kernels", "rows": rows, "cols": cols, "isa": options.isa, "table": table}
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, "cpu")


if __name__ == "__main__":
    main()

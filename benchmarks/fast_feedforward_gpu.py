"""Fast feedforward on a GPU against a dense bf16 layer (cuBLAS) of as many neurons, over batch, width and depth.

First the kernels are checked on the device against the plain twin (fp32 and bf16, gradients too). Then each cell of
the map times, as CUDA graphs in turn: the dense layer (gelu apart, and fused by cuBLASLt), the plain twin, and every
way of ours. A graph runs eight layers of their own weights, once each, after the L2 cache was overwritten, so that no
weight is in it. Medians over rounds. Inputs are random, so paths vary. Last, a training step: ours, masked, dense.

    python -m benchmarks.fast_feedforward_gpu --output benchmarks/results/fast_feedforward_gpu.nvidia-h100.json
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoestring.evaluation.results import provenance, write_result
from shoestring.fastff import functional
from shoestring.fastff import triton_inference as inference
from shoestring.fastff import triton_training as training

LAYERS = 8
PLANS = {
    "path": inference.Plan("path", 1),
    "path2": inference.Plan("path", 2),
    "path3": inference.Plan("path", 3),
    "grouped": inference.Plan("grouped"),
}
DENSE = ("dense", "dense_fused")
Layer = tuple[Tensor, Tensor]  # w_in and w_out, one row more than nodes: cuBLAS likes even sizes


def layer(width: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> Layer:
    neurons = 2 ** (depth + 1)
    w_in = torch.randn(neurons, width, device="cuda", dtype=dtype) / width**0.5
    return w_in, torch.randn(neurons, width, device="cuda", dtype=dtype) / (depth + 1) ** 0.5


def tree(weights: Layer) -> tuple[Tensor, None, Tensor]:
    return weights[0][None, :-1], None, weights[1][None, :-1]


def contenders(neurons: int) -> dict[str, Callable[[Tensor, Layer], Tensor]]:
    bias = torch.zeros(neurons, device="cuda", dtype=torch.bfloat16)  # cuBLASLt fuses a gelu with a bias only

    def fused(x: Tensor, weights: Layer) -> Tensor:
        return torch._addmm_activation(bias, x, weights[0].T, use_gelu=True) @ weights[1]

    def way(plan: inference.Plan) -> Callable[[Tensor, Layer], Tensor]:
        return lambda x, weights: inference.infer(x, *tree(weights), plan=plan)

    return {
        "dense": lambda x, weights: F.gelu(x @ weights[0].T) @ weights[1],
        "dense_fused": fused,
        "twin": lambda x, weights: functional.plain(x, *tree(weights)),
        **{name: way(plan) for name, plan in PLANS.items()},
    }


def captured(call: Callable[[Tensor, Layer], Tensor], x: Tensor, layers: list[Layer]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(x, layers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in layers:
            call(x, weights)
    return graph


def measure(
    x: Tensor, layers: list[Layer], rounds: int, flush: Tensor
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Microseconds a layer of each contender, and their ranges."""
    graphs, counts = {}, {}
    for name, call in contenders(len(layers[0][0])).items():
        few = layers[:2] if name == "twin" else layers
        graphs[name], counts[name] = captured(call, x, few), len(few)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            if name == "twin" and turn > 3:
                continue
            flush.zero_()
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            events[name].append((began, ended))
    torch.cuda.synchronize()
    times = {
        name: [1000 * began.elapsed_time(ended) / counts[name] for began, ended in pairs[1:]]
        for name, pairs in events.items()
    }
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return medians, {name: [round(min(values), 2), round(max(values), 2)] for name, values in times.items()}


def cell(batch: int, width: int, depth: int, medians: dict[str, float]) -> dict[str, Any]:
    plan = inference.choose(batch, width, depth, torch.bfloat16)
    chosen = next(name for name, known in PLANS.items() if known == plan)
    dense = min(DENSE, key=medians.__getitem__)
    best = min(PLANS, key=medians.__getitem__)
    return {
        "batch": batch, "width": width, "depth": depth, "us": medians, "chosen": chosen, "best": best,
        "dense_over_chosen": round(medians[dense] / medians[chosen], 3),
        "chosen_over_best": round(medians[chosen] / medians[best], 3),
    }  # fmt: skip


def check(depth: int, trees: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Largest errors of ours and of the twin against fp64, over tokens whose path is sure (|z| > 0.01 throughout).

    Raises: SystemExit where ours is more than twice the twin's.
    """
    nodes = 2 ** (depth + 1) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    tensors = [
        normal(tokens, width), normal(trees, nodes, width) / width**0.5, normal(trees, nodes) / 4,
        normal(trees, nodes, width) / (trees * (depth + 1)) ** 0.5,
    ]  # fmt: skip
    exact = [tensor.double() for tensor in tensors]
    sure = functional.visit(*exact[:3])[1].abs().amin((1, 2)) > (0.01 if dtype != torch.float32 else 1e-5)
    upstream = normal(tokens, width) * sure[:, None]  # tokens that may part give no gradient

    def results(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in arguments]
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
        return [y[sure].detach(), *gradients]

    truth, twin = results(functional.plain, exact), results(functional.plain, tensors)
    ours = {
        "training": results(training.apply, tensors),
        **{name: [inference.infer(*tensors, plan=plan)[sure]] for name, plan in PLANS.items()},
    }
    report: dict[str, Any] = {
        "depth": depth, "trees": trees, "width": width, "tokens": tokens, "dtype": str(dtype).split(".")[1],
        "sure_tokens": round(sure.double().mean().item(), 3), "errors": {},
    }  # fmt: skip
    for way, values in ours.items():
        for name, mine, plain, reference in zip(
            ("y", "dx", "dw_in", "db_in", "dw_out"), values, twin, truth, strict=False
        ):
            scale = reference.abs().max().item()
            errors = [(value.double() - reference).abs().max().item() / scale for value in (mine, plain)]
            report["errors"][f"{way} {name}"] = [float(f"{error:.2e}") for error in errors]
            # The sums' order differs; a rounding of the largest value (fp32: a few) is no fault.
            if not errors[0] <= 2 * errors[1] + (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps:
                raise SystemExit(
                    f"{way} {name} errs by {errors[0]:.2e}, the twin by {errors[1]:.2e}: {report}"
                )
    return report


def training_step(batch: int, width: int, depth: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of forward and backward with all gradients, without graphs: ours, masked, dense."""
    weights = [tensor.requires_grad_() for tensor in layer(width, depth)]
    x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    trees = [tensor[None, :-1].detach().clone().requires_grad_() for tensor in weights]
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "ours": (lambda: training.apply(x, trees[0], None, trees[1]), trees),
        "masked": (lambda: functional.masked(x, trees[0], None, trees[1]), trees),
        "dense": (lambda: F.gelu(x @ weights[0].T) @ weights[1], weights),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, (call, parameters) in calls.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            torch.autograd.grad(call(), [x, *parameters], upstream)
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - began))
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return {"batch": batch, "width": width, "depth": depth, "ms": medians}


def compile_kernels(width: int, depth: int, batches: list[int]) -> None:
    """Fill Triton's cache on disk: processes compile beside each other."""
    weights = layer(width, depth)
    for batch in batches:
        x = torch.zeros(batch, width, device="cuda", dtype=torch.bfloat16)
        for plan in PLANS.values():
            inference.infer(x, *tree(weights), plan=plan)
    torch.cuda.synchronize()


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 128, 1024, 4096, 16384])
    arguments.add_argument("--widths", type=int, nargs="*", default=[768, 1024, 2048, 4096, 8192])
    arguments.add_argument("--depths", type=int, nargs="*", default=[11, 13])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument(
        "--workers", type=int, default=10, help="processes that compile kernels beforehand; 0: none"
    )
    arguments.add_argument("--output", type=Path, help="write the result file here")
    arguments.add_argument(
        "--relabel",
        type=Path,
        help="a result file: name the ways that are chosen by now; times stay as measured",
    )
    options = arguments.parse_args()
    if options.relabel:
        relabel(options.relabel)
        return
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    began = time.perf_counter()
    shapes = [(width, depth) for depth in options.depths for width in options.widths]
    if options.workers:
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
            for job in [pool.submit(compile_kernels, *shape, options.batches) for shape in shapes]:
                job.result()
    compiled = time.perf_counter() - began
    checks = [
        check(depth, trees, width, tokens, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for depth, trees, width, tokens in ((0, 1, 768, 300), (3, 3, 48, 333), (11, 1, 768, 4096))
    ]
    print(f"kernels compiled in {compiled:.0f} s, and as exact as the plain twin in {len(checks)} settings")

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    table = []
    print(
        f"{'depth':>5} {'width':>6} {'batch':>6} {'dense':>9} {'twin':>10} {'chosen':>16} {'best':>8}   (us a layer)"
    )
    for width, depth in shapes:
        layers = [layer(width, depth) for _ in range(LAYERS)]
        for batch in options.batches:
            x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                medians, ranges = measure(x, layers, options.rounds, flush)
            row = {**cell(batch, width, depth, medians), "range_us": ranges}
            table.append(row)
            print(
                f"{depth:5} {width:6} {batch:6} {min(medians[name] for name in DENSE):9.1f} {medians['twin']:10.1f} "
                f"{row['chosen']:>7} {medians[row['chosen']]:8.1f} {row['best']:>8}   "
                f"dense / ours {row['dense_over_chosen']:.2f}"
            )
            torch.cuda.empty_cache()
        del layers
    steps = [
        training_step(batch, width, min(options.depths), options.rounds)
        for batch in (4096, 16384) for width in (768, 2048)
    ]  # fmt: skip
    for step in steps:
        print("training, {width} wide, {batch} tokens, depth {depth}: {ms} ms".format_map(step))
    result = {
        "benchmark": "fast_feedforward_gpu", "dtype": "bfloat16", "trees": 1, "bias": False, "layers": LAYERS,
        "table": table, "break_even": break_even(table), "training": steps, "checks": checks,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "seconds": {"compiling": round(compiled, 1), "all": round(time.perf_counter() - began, 1)},
    }  # fmt: skip
    for row in result["break_even"]:
        print("depth {depth}, width {width}: faster than dense at batches {faster_at}".format_map(row))
    print(json.dumps({key: value for key, value in result.items() if key not in ("table", "checks")}))
    if options.output:
        write_result(options.output, result, "cuda")


def relabel(path: Path) -> None:
    """Apply today's choice of a way to a file's measured times."""
    result = json.loads(path.read_text())
    result["table"] = [
        {**cell(row["batch"], row["width"], row["depth"], row["us"]), "range_us": row["range_us"]}
        for row in result["table"]
    ]
    result["break_even"] = break_even(result["table"])
    result["ways_chosen_as_of"] = provenance()["commit"]
    path.write_text(json.dumps(result, indent=1) + "\n")


def break_even(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By depth and width, the batches at which the chosen way is faster than the faster dense layer."""
    faster: dict[tuple[int, int], list[int]] = {}
    for row in table:
        faster.setdefault((row["depth"], row["width"]), [])
        if row["dense_over_chosen"] > 1:
            faster[row["depth"], row["width"]].append(row["batch"])
    return [
        {"depth": depth, "width": width, "faster_at": batches} for (depth, width), batches in faster.items()
    ]


if __name__ == "__main__":
    main()

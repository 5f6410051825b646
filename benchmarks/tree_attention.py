"""Tree attention over the paged cache on a GPU: right, and its time per layer against PyTorch's masked SDPA.

First every shape's error against float64, in bfloat16 and float32: at most twice that of the same computation in PyTorch.
Then one layer's time, in CUDA graphs over layers whose caches take turns: a binary tree of `rows` rows in each slot behind
`context` cached tokens. Ours also turns queries and keys to their positions and caches the new ones. SDPA reads dense keys
of exactly the right length under the same mask (none for one row), and its fastest form counts. Last, the small kernels
beside attention.

    python -m benchmarks.tree_attention --output benchmarks/results/tree_attention.nvidia-h100.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring.engine.cuda.attention import AttentionPlan, Workspace, attention_twin, tree_attention
from shoestring.engine.cuda.cache_moves import move_rows
from shoestring.engine.cuda.choose import Candidates, choose
from shoestring.engine.cuda.layout import (
    BLOCK_TOKENS,
    Bucket,
    DeviceLayout,
    HostLayout,
    Moves,
    block_shape,
    read_cache,
)
from shoestring.engine.cuda.rotary import Turning, rotary_table, rotary_twin, rotate_and_store
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.evaluation.results import write_result

SHAPES = {"smollm2-135m": (9, 3, 64), "7b": (32, 32, 128), "7b-grouped": (32, 8, 128)}
CONTEXTS = (128, 512, 2048, 8192)
ROWS = (1, 16, 64)
SLOTS = (1, 8)
SPLITS = (1, 4, 16)
REPETITIONS = 7


@dataclass
class Setting:
    """A step of equal slots, each a binary tree of `rows` rows behind `context` tokens."""

    shape: tuple[int, int, int]
    slots: int
    rows: int
    context: int
    dtype: torch.dtype
    layers: int

    def __post_init__(self) -> None:
        heads, kv_heads, head_dim = self.shape
        torch.manual_seed(0)
        pages = -(-(self.context + self.rows) // BLOCK_TOKENS)
        arena = torch.randn(
            self.slots * pages, *block_shape(self.layers, kv_heads, head_dim), dtype=self.dtype, device="cuda"
        )
        order = torch.randperm(len(arena)).view(self.slots, pages)  # neighbours in a sequence lie apart
        self.blocks = [[arena[index] for index in row] for row in order.tolist()]
        self.table = (arena.data_ptr() + order * arena[0].nbytes).to("cuda")
        self.layout = DeviceLayout.allocate(Bucket(self.slots, self.slots * self.rows), "cuda")
        parents = [-1, *((row - 1) // 2 for row in range(1, self.rows))]
        slots = range(self.slots)
        self.host = HostLayout(self.layout)
        self.host.fill(
            dict.fromkeys(slots, TokenTree([0] * self.rows, parents)),
            dict.fromkeys(slots, self.context),
            {slot: slot for slot in slots},
        )
        self.host.send()
        width = (heads + 2 * kv_heads) * head_dim
        self.packed = torch.randn(self.slots * self.rows, width, dtype=self.dtype, device="cuda")
        self.query = self.packed[:, : heads * head_dim].unflatten(1, (heads, head_dim)).contiguous()
        frequencies = 1e4 ** -(torch.arange(0, head_dim, 2, device="cuda") / head_dim)
        self.turning = Turning(rotary_table(frequencies, self.context + self.rows))
        self.scale = head_dim**-0.5

    def plan(self, **settings: Any) -> AttentionPlan:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        return AttentionPlan.choose(
            self.slots, self.slots * self.rows, *self.shape, self.dtype, processors=processors, **settings
        )

    def ours(self, plan: AttentionPlan) -> tuple[Callable[[int], None], Tensor]:
        workspace, out = Workspace.allocate([plan], "cuda"), torch.empty_like(self.query)

        def run(layer: int) -> None:
            tree_attention(
                self.packed, self.turning, self.table, layer, self.layout, plan, workspace, out,
                cache_dtype=self.dtype, scale=self.scale,
            )  # fmt: skip

        return run, out

    def twin(self, layer: int, dtype: torch.dtype) -> Tensor:
        """The same in PyTorch; it works on copies."""
        heads, kv_heads, head_dim = self.shape
        blocks = [[block.to(dtype, copy=True) for block in row] for row in self.blocks]
        packed = self.packed.to(dtype, copy=True)
        turning = replace(self.turning, cosines=self.turning.cosines.to(dtype))
        rotary_twin(
            packed, turning, blocks, layer, self.layout, heads=heads, kv_heads=kv_heads, head_dim=head_dim
        )
        query = packed[:, : heads * head_dim].unflatten(1, (heads, head_dim))
        return attention_twin(query, blocks, layer, self.layout, scale=self.scale)

    def sdpa(self) -> list[Callable[[int], Tensor]]:
        """PyTorch's attention over dense keys, in its forms; some are refused for some shapes."""
        heads, kv_heads, head_dim = self.shape
        length = self.context + self.rows
        dense = [
            [
                torch.stack(states)
                for states in zip(*(read_cache(row, layer, length) for row in self.blocks), strict=True)
            ]
            for layer in range(self.layers)
        ]
        mask = more = None
        if self.rows > 1:
            tree = TokenTree([0] * self.rows, [-1, *((row - 1) // 2 for row in range(1, self.rows))])
            # Rows of the mask are aligned, or the fast kernels refuse it.
            width = -(-length // 16) * 16
            aligned = torch.ones(self.rows, width, dtype=torch.bool, device="cuda")
            aligned[:, self.context : length] = tree.ancestor_mask().cuda()
            mask = aligned[:, :length].expand(self.slots, 1, -1, -1)
            more = aligned.repeat(heads // kv_heads, 1)[:, :length].expand(self.slots, 1, -1, -1)
        query = self.query.view(self.slots, self.rows, heads, head_dim).transpose(1, 2)

        def grouped(layer: int) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                query, *dense[layer], attn_mask=mask, scale=self.scale, enable_gqa=heads != kv_heads
            )

        def as_rows(layer: int) -> Tensor:
            """A group's heads as more rows of one head: keys are read once."""
            rows = query.reshape(self.slots, kv_heads, -1, head_dim)
            return torch.nn.functional.scaled_dot_product_attention(
                rows, *dense[layer], attn_mask=more, scale=self.scale
            )

        return [grouped] if heads == kv_heads else [grouped, as_rows]


def graph_seconds(run: Callable[[int], object], layers: int) -> float:
    """Seconds per layer, the median of several replays of a graph of all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = -(-16 // layers)
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for layer in range(layers):
                run(layer)
    graph.replay()
    times = []
    for _ in range(REPETITIONS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / (repeats * layers))
    return statistics.median(times)


def check(name: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The kernel's error and PyTorch's, both against float64, with turns on the way and in front."""
    rows = []
    for slots, count, turns in ((1, 1, True), (8, 16, True), (8, 16, False), (1, 64, True)):
        setting = Setting(SHAPES[name], slots, count, 500, dtype, 2)
        exact, plain = setting.twin(1, torch.float64), setting.twin(1, dtype)
        run, out = setting.ours(setting.plan(splits=4, turns=turns))
        packed = setting.packed.clone()
        for _ in range(20):  # a race would show
            setting.packed.copy_(packed)
            run(1)
        ours, theirs = (float((result.double() - exact).abs().max()) for result in (out, plain))
        rows.append(
            {
                "shape": name, "dtype": str(dtype).removeprefix("torch."), "slots": slots, "rows": count,
                "turns": turns, "error": ours, "pytorch_error": theirs, "right": ours <= max(2 * theirs, 1e-6),
            }
        )  # fmt: skip
    return rows


def measure(name: str, slots: int, rows: int, context: int, settings: dict[str, int]) -> dict[str, Any]:
    """Microseconds per layer of ours by splits, and of the fastest SDPA."""
    _, kv_heads, head_dim = SHAPES[name]
    layer_bytes = slots * (context + rows) * 2 * kv_heads * head_dim * 2
    layers = max(
        2, min(16, (256 << 20) // layer_bytes)
    )  # beyond the second-level cache, as a model's layers are
    setting = Setting(SHAPES[name], slots, rows, context, torch.bfloat16, layers)
    chosen = setting.plan(**settings)
    splits = {}
    for count in sorted({*SPLITS, chosen.splits}):
        splits[count] = graph_seconds(setting.ours(replace(chosen, splits=count))[0], layers)
    dense = min(graph_seconds(run, layers) for run in setting.sdpa())
    ours = splits[chosen.splits]
    return {
        "shape": name, "slots": slots, "rows": rows, "context": context,
        "microseconds": round(1e6 * ours, 2), "splits": chosen.splits, "block_rows": chosen.block_rows,
        "stages": chosen.stages, "min_keys": chosen.min_keys,
        "gb_per_second": round(layer_bytes / ours / 1e9, 1), "sdpa_microseconds": round(1e6 * dense, 2),
        "ratio": round(dense / ours, 2), "by_splits": {count: round(1e6 * s, 2) for count, s in splits.items()},
    }  # fmt: skip


def small_kernels(name: str, vocab_size: int) -> dict[str, float]:
    """Microseconds of rotary, moves and choice, of 64 rows in one slot."""
    heads, kv_heads, head_dim = SHAPES[name]
    setting = Setting(SHAPES[name], 1, 64, 512, torch.bfloat16, 16)
    layout, table = setting.layout, setting.table
    packed = torch.randn(64, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16, device="cuda")
    shared: dict[str, Any] = {"kv_heads": kv_heads, "cache_dtype": torch.bfloat16}
    times = {
        "rotary": graph_seconds(
            lambda layer: rotate_and_store(
                packed, setting.turning, table, layer, layout, heads=heads, head_dim=head_dim, **shared
            ),
            16,
        )
    }
    for moved in (0, 5):
        trees, cached = {0: TokenTree.chain([0] * 64)}, {0: 512}
        moves = [Moves(0, 512, range(1, 1 + moved))]
        sampling = {0: SamplingOptions(temperature=1.0)}
        setting.host.fill(trees, cached, {0: 0}, sampling, moves=moves)
        setting.host.send()
        times[f"move_{moved}_in_16_layers"] = graph_seconds(
            lambda _: move_rows(table, layout, layers=16, head_dim=head_dim, **shared), 16
        )
    logits = torch.randn(64, vocab_size, device="cuda")
    for top_k in (1, 8):
        candidates = Candidates.allocate(64, vocab_size, top_k, "cuda")
        drawn = torch.empty(64, dtype=torch.int32, device="cuda")
        top = torch.empty(64, top_k, dtype=torch.int32, device="cuda")

        def pick(
            _: int, candidates: Candidates = candidates, drawn: Tensor = drawn, top: Tensor = top
        ) -> None:
            choose(logits, layout, candidates, drawn, top)

        times[f"choose_sampled_top_{top_k}_of_{vocab_size}"] = graph_seconds(pick, 16)
    times["torch_argmax"] = graph_seconds(lambda _: torch.argmax(logits, dim=-1), 16)
    return {kernel: round(1e6 * seconds, 2) for kernel, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the result file here")
    parser.add_argument("--stages", type=int, help="of the pipeline that reads keys (as planned by default)")
    parser.add_argument("--min-keys", type=int, help="of a share (as planned by default)")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    settings = {
        name: value for name in ("stages", "min_keys") if (value := getattr(options, name)) is not None
    }
    began = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = []
    for name in options.shapes:
        for dtype in (torch.bfloat16, torch.float32):
            checks += check(name, dtype)
    for row in checks:
        if not row["right"]:
            print("WRONG", row)
    print(f"{sum(row['right'] for row in checks)} of {len(checks)} checks right", flush=True)
    print(
        f"{'shape':>12} {'slots':>5} {'rows':>4} {'context':>7} {'us':>8} {'GB/s':>6} {'SDPA':>8} {'ratio':>6}  by splits"
    )
    rows = []
    for name in options.shapes:
        for slots in SLOTS:
            for count in ROWS:
                for context in CONTEXTS:
                    row = measure(name, slots, count, context, settings)
                    rows.append(row)
                    print(
                        f"{name:>12} {slots:>5} {count:>4} {context:>7} {row['microseconds']:8.1f} "
                        f"{row['gb_per_second']:6.0f} {row['sdpa_microseconds']:8.1f} {row['ratio']:6.2f}  "
                        f"{row['by_splits']}",
                        flush=True,
                    )
    small = {name: small_kernels(name, 49152) for name in options.shapes}
    result = {
        "benchmark": "tree_attention",
        "dtype": "bfloat16",
        "repetitions": REPETITIONS,
        "all_right": all(row["right"] for row in checks),
        "checks": checks,
        "rows": rows,
        "small_kernels_microseconds": small,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps({key: value for key, value in result.items() if key not in ("rows", "checks")}))
    if options.output:
        write_result(options.output, result, "cuda")


if __name__ == "__main__":
    main()

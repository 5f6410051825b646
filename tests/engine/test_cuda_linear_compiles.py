"""The few-row products compile for an H100 where there is none: within its memory, without spills, by wide loads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from compiled_launches import SHARED_MEMORY, compile_problem
from shoestring.engine.cuda.tuning import LaunchConfig, Problem, heuristic

SMOLLM2 = {"qkv": (960, 576), "gate": (1536, 576), "down": (576, 1536), "head": (49152, 576)}
SEVEN = {"qkv": (12288, 4096), "output": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008)}

def check(shape, rows, kind, pdl=False):
    gated = shape in (SMOLLM2["gate"], SEVEN["gate"])
    compute = torch.float32 if kind == "float32" else torch.float16 if kind == "float16" else torch.bfloat16
    norm = gated or shape in (SMOLLM2["qkv"], SEVEN["qkv"])
    problem = Problem(*shape, rows, kind, gated, compute)
    for made in compile_problem(problem, norm=norm, residual=not norm, pdl=pdl):
        constants = made.launch.constants
        tile = {name: constants[name] for name in ("BLOCK_N", "BLOCK_K", "BLOCK_M", "SPLIT_K") if name in constants}
        print(problem.key, made.launch.kernel.__name__, made.launch.grid, tile, made.launch.warps, "warps",
              made.registers, "registers", made.spilled, "spilled", made.shared, "shared", flush=True)
        assert made.shared <= SHARED_MEMORY
        assert not made.spilled or made.spilled <= 64, made.spilled  # a few bytes outside the loop do no harm
        name = made.launch.kernel.__name__
        assert ("griddepcontrol.wait" in made.ptx) == pdl
        assert ("prefetch.global.L2" in made.ptx) == bool(pdl and constants.get("LINES") and constants.get("UNROLL", 1))
        if name == "few_rows_kernel":
            assert "cp.async.c" in made.ptx
            assert ("mma.sync" in made.ptx or "wgmma.mma_async" in made.ptx) == (kind != "float32")
            assert ("lop3.b32" in made.ptx) == (kind == "int4")
        elif name == "one_row_kernel":
            assert "ld.global.L1::evict_first.L2::cache_hint.v4.b32" in made.ptx
            assert "ld.global.b16" not in made.ptx

def check_whole_rows(shape, rows, config):
    # The weights are asked for before the wait, and each warp multiplies slices of its own.
    gated = shape == SMOLLM2["gate"]
    problem = Problem(*shape, rows, "bfloat16", gated)
    made = compile_problem(problem, norm=gated, residual=not gated, scaled=gated, pdl=True, config=config)[-1]
    print(problem.key, config, made.registers, "registers", made.spilled, "spilled", made.shared, "shared", flush=True)
    assert made.launch.kernel.__name__ == "whole_rows_kernel"
    assert made.shared <= SHARED_MEMORY
    assert not made.spilled, made.spilled
    before, after = made.ptx.split("griddepcontrol.wait")
    assert ("launch_dependents" in after) == config.late != ("launch_dependents" in before)
    loads = config.block_n * (config.block_k + config.tail) * (2 if gated else 1) // (config.warps * 32 * 8)
    assert before.count("ld.global.L1::evict_first.L2::cache_hint.v4.b32") == loads
    sums = config.block_n // 16 * config.block_m // 8 * (2 if gated else 1)
    assert after.count("mma.sync") == (config.block_k + config.tail) // 16 // config.warps * sums and "mma" not in before

def check_fragments(shape, rows, kind):
    # From memory into the tensor cores: between products nothing is exchanged, by neither shared memory nor shuffles.
    problem = Problem(*shape, rows, kind, shape == SEVEN["gate"])
    config = heuristic(problem)
    made = compile_problem(problem, norm=True, scaled=True, pdl=True, config=config)[-1]
    print(problem.key, config, made.registers, "registers", made.spilled, "spilled", made.shared, "shared", flush=True)
    assert config.kernel == "fragments"
    assert made.shared <= 4096 * config.block_m
    assert not made.spilled, made.spilled
    before, after = made.ptx.split("griddepcontrol.wait")
    fetched = "ld.global.L1::evict_first.L2::cache_hint.v2.b32"
    assert (before.count(fetched) > 0) == (config.stages > 1), "the first weights are asked for before the wait"
    first, last = after.index("mma.sync"), after.rindex("mma.sync")
    for exchange in ("shfl", "bar.sync", "shared", "ldmatrix", "stmatrix"):
        assert exchange not in after[first:last], exchange

def check_copied_rows(shape, rows, kind):
    # No fence holds the tensor cores up until all loads on the way have come.
    problem = Problem(*shape, rows, kind, shape == SEVEN["gate"])
    config = heuristic(problem, copies=True)
    made = compile_problem(problem, norm=True, scaled=True, pdl=True, config=config)[-1]
    print(problem.key, config, made.registers, "registers", made.spilled, "spilled", made.shared, "shared", flush=True)
    assert config.written and config.tma
    assert made.shared <= SHARED_MEMORY
    assert not made.spilled, made.spilled
    assert "cp.async.bulk.tensor.2d" in made.ptx and "cp.async.c" in made.ptx
    assert "wgmma.mma_async" in made.ptx and "fence.proxy.async" not in made.ptx.split("wgmma.fence")[0]

def check_wide_tiles(shape, rows):
    # The tensor cores wait for nothing but tiles that the copy engine brings, and for their last sums.
    gated = shape == SEVEN["gate"]
    problem = Problem(*shape, rows, "bfloat16", gated)
    config = heuristic(problem, copies=True)
    made = compile_problem(problem, norm=gated, residual=not gated, pdl=True, config=config)[-1]
    print(problem.key, config, made.registers, "registers", made.spilled, "spilled", made.shared, "shared", flush=True)
    assert config.kernel == "wide_tiles"
    assert made.shared <= SHARED_MEMORY
    assert not made.spilled, made.spilled
    matrices, tails = (2 if gated else 1), (2 if config.tail else 1)
    steps = config.block_k // 16 * (config.block_m // 64 if config.warps == 4 else 1)
    assert made.ptx.count("wgmma.mma_async") == steps * matrices * tails
    assert "mma.sync" not in made.ptx and "cp.async.bulk.tensor.2d" in made.ptx and "cp.async.c" not in made.ptx
    loop = made.ptx[made.ptx.index("wgmma.mma_async") : made.ptx.rindex("wgmma.mma_async")]
    assert loop.count("wgmma.wait_group") == 0

if sys.argv[1] == "few":
    check_wide_tiles(SEVEN["gate"], 64)
    check_wide_tiles(SEVEN["qkv"], 128)
    check_wide_tiles(SEVEN["down"], 64)
    check_fragments(SEVEN["gate"], 1, "int4")
    check_fragments(SEVEN["down"], 1, "int8")
    check_fragments(SEVEN["qkv"], 8, "int4")
    check_fragments(SEVEN["qkv"], 16, "int8")
    check_copied_rows(SEVEN["qkv"], 64, "int8")
    check_copied_rows(SEVEN["gate"], 32, "int4")
    check_whole_rows(SMOLLM2["gate"], 16, LaunchConfig("whole_rows", 16, 1024, 8, warps=8, slices=16))
    check_whole_rows(SMOLLM2["down"], 16, LaunchConfig("whole_rows", 16, 2048, 16, warps=16, slices=64))
    check_whole_rows(SMOLLM2["gate"], 24, LaunchConfig("whole_rows", 16, 512, 8, warps=4, slices=4, tail=64))
    check_whole_rows(SMOLLM2["down"], 24, LaunchConfig("whole_rows", 16, 1024, 8, warps=8, slices=8, tail=512, late=True))
    check(SMOLLM2["qkv"], 1, "bfloat16", pdl=True)
    check(SMOLLM2["down"], 64, "bfloat16")
    check(SEVEN["gate"], 16, "bfloat16", pdl=True)
    check(SEVEN["output"], 1, "int4")
    check(SEVEN["qkv"], 16, "int8")
else:
    for rows in map(int, sys.argv[1:]):
        for kind in ("bfloat16", "int8", "int4"):
            for shape in (*SMOLLM2.values(), *SEVEN.values()):
                check(shape, rows, kind, pdl=rows == 8)
        for kind in ("float16", "float32"):
            check(SMOLLM2["gate"], rows, kind)
            check(SEVEN["down"], rows, kind)
"""


@pytest.mark.parametrize(
    "processes",
    [[["few"]], pytest.param([["1", "64"], ["8", "16"]], marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_products_compile_for_a_gpu_that_is_not_there(processes: list[list[str]], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # In a file: Triton reads the kernels' source, and its own cache would hide a failure.
    file = tmp_path / "compile_products.py"
    file.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(root / "tests" / "parity"), str(root / "src")]),
    }
    # At once: compiling takes one core each.
    running = [
        subprocess.Popen(
            [sys.executable, file, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments in processes
    ]
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(lambda process: process.communicate()[0], running))
    for process, text in zip(running, told, strict=True):
        assert process.returncode == 0, text[-4000:]
        assert "registers" in text, "nothing was compiled"

"""The kernels compile for an H100 where there is none, within its shared memory, and read the cache 16 bytes at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ATTENTION = """
import torch
from compiled_launches import resources
from compiled_triton import compile_for_h100
from shoestring.engine.cuda.attention import AttentionPlan, _power_of_two
from shoestring.engine.cuda.attention_kernels import TRITON_TYPES, attention_kernel

def attention(plan, dtype, window=False, softcap=False, norm=False):
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    code = compile_for_h100(
        attention_kernel,
        f"*{kind} *{kind} *fp32 *{kind} *{kind} *i64 " + "*i32 " * 7 + "*fp32 *fp32 *i32 i32 i32 i32! i32! " + "i32 " * 5
        + "fp32 fp32 fp32",
        dict(
            SLOTS=_power_of_two(plan.slots), GROUP=plan.group, D=plan.head_dim, BLOCK_D=_power_of_two(plan.head_dim),
            BLOCK_M=plan.block_rows, BLOCK_N=plan.block_keys, BLOCK_R=plan.block_own, HAS_WINDOW=window,
            CACHE=TRITON_TYPES[dtype], HAS_SOFTCAP=softcap, TURNS=plan.turns, ROTARY=plan.head_dim, NORM=norm,
            ADDS_ONE=norm, PDL=True,
        ),
        warps=plan.warps, stages=plan.stages,
    )
    _, spilled = resources(code["cubin"])
    assert not spilled or spilled <= 16, (plan, dtype, spilled)
    ptx = code["ptx"]
    assert "ld.global.b16" not in ptx
    assert plan.stages == 1 or "cp.async.cg.shared.global" in ptx
    assert ("mma.sync" in ptx or "wgmma.mma_async" in ptx) == (dtype != torch.float32)

choose = AttentionPlan.choose
attention(choose(1, 1, 9, 3, 64, torch.bfloat16), torch.bfloat16)
attention(choose(8, 64, 32, 8, 128, torch.bfloat16), torch.bfloat16)
attention(choose(1, 512, 32, 32, 80, torch.bfloat16), torch.bfloat16)
attention(choose(1, 64, 9, 3, 64, torch.bfloat16), torch.bfloat16)
attention(choose(1, 16, 16, 8, 128, torch.bfloat16), torch.bfloat16, norm=True)
attention(choose(1, 1, 8, 4, 64, torch.float16), torch.float16, window=True, softcap=True)
attention(choose(1, 16, 9, 3, 64, torch.float32), torch.float32)
"""

OTHERS = """
import triton.language as tl
from compiled_triton import compile_for_h100
from shoestring.engine.cuda.cache_moves import move_kernel
from shoestring.engine.cuda.choose import best_kernel, merge_best_kernel
from shoestring.engine.cuda.rotary import rotary_kernel

for kind, dtype in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
    for D, rotary, norm in ((80, 32, False), (256, 256, True)):
        compile_for_h100(
            rotary_kernel,
            f"*{kind} *fp32 *i64 *{kind} *{kind} *i32 *i32 *i32 *i32 *i32 i32! i32 i32 i32 i32 fp32",
            dict(
                D=D, BLOCK_D=128 if D == 80 else D, ROTARY=rotary, BLOCK_H=4, CACHE=dtype, NORM=norm, ADDS_ONE=norm,
                PDL=True,
            ),
            warps=2 if D <= 128 else 4,
        )
        code = compile_for_h100(
            move_kernel, "*i64 *i32 *i32 *i32 *i32 i32 i32",
            dict(D=D, BLOCK_D=128 if D == 80 else D, CHUNK=64 if D <= 128 else 32, CACHE=dtype),
        )
        assert "st.global.v4" in code["ptx"] and "bar.sync" in code["ptx"]
    for top in (1, 16):
        code = compile_for_h100(
            best_kernel, f"*{kind} *i32 *i32 *i32 *fp32 *fp32 *i32 *i32 i32 i32! i32", dict(TOP=top, TILE=2048)
        )
        assert "lg2.approx" not in code["ptx"], "the noise needs a logarithm that is right near 1"
for top in (1, 16):
    compile_for_h100(
        merge_best_kernel, "*i32 *fp32 *i32 *i32 *i32 *i32 i32",
        dict(TOP=top, BLOCK_TILES=64, BLOCK_TOP=2 if top == 1 else 32),
    )
"""


@pytest.mark.parametrize("program", [ATTENTION, OTHERS], ids=["attention", "others"])
def test_kernels_compile_for_a_gpu_that_is_not_there(program: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # In a file: Triton reads the kernels' source, and its own cache would hide a failure.
    file = tmp_path / "compile_kernels.py"
    file.write_text(program)
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(root / "tests" / "parity"), str(root / "src")]),
    }
    done = subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

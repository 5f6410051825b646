"""Compile a product's launches for an H100 that is not there (a process that imports this must not interpret kernels)."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from shoestring.engine.cuda.products import Launch, LinearWorkspace, Product, ScaledRows, launches
from shoestring.engine.cuda.tuning import LaunchConfig, Problem, Tuning
from shoestring.engine.cuda.weights import DeviceWeight

SHARED_MEMORY = 227 << 10
"""Bytes that a program may have on an H100."""

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_TOOLS = os.path.join(triton.__path__[0], "backends", "nvidia", "bin")


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code and what it takes."""

    launch: Launch
    ptx: str
    shared: int
    registers: int | None
    spilled: int | None
    """Bytes of stack and local memory; None, like the registers, where there is no cuobjdump."""


def compile_problem(
    problem: Problem,
    *,
    norm: bool,
    residual: bool = False,
    scaled: bool = False,
    pdl: bool = False,
    config: LaunchConfig | None = None,
) -> list[Compiled]:
    """Compile what the heuristic (or `config`) launches for a problem: float32 rows under a norm, bfloat16 ones without.

    Args:
        residual: the result is added to float32 rows, and they are left for a norm.
        scaled: the norm's rows were left by the product in front.
    """
    rows, outputs, inputs = problem.rows, problem.outputs, problem.inputs
    weight = _weight(problem)
    x = _meta(rows, inputs, dtype=torch.float32 if norm else problem.compute)
    out = _meta(rows, outputs, dtype=torch.float32 if residual else problem.compute)
    workspace = LinearWorkspace(
        _meta(1 << 23, dtype=torch.float32),
        _meta(1 << 12, dtype=torch.int32),
        _meta(1 << 24, dtype=torch.float16),
        _meta(256, 256, dtype=torch.float32),
    )
    gain = _meta(inputs, dtype=problem.compute)
    found = Product(
        x, weight, weight if problem.gated else None, out,
        norm=SimpleNamespace(gain=gain, epsilon=1e-5, adds_one=False) if norm else None,
        residual=out if residual else None, activation="silu" if problem.gated else None,
        scaled=ScaledRows(_meta(rows, inputs, dtype=problem.compute), workspace.squares[:36, :rows]) if scaled else None,
        next_norm=SimpleNamespace(gain=_meta(outputs, dtype=problem.compute), epsilon=1e-5, adds_one=False)
        if residual else None,
    )  # fmt: skip
    return [compile_launch(launch) for launch in launches(found, workspace, Tuning(pdl=pdl), config)]


def compile_launch(launch: Launch) -> Compiled:
    """Compile as a launch would: pointers and numbers divisible by 16 are known to be, ones are constants."""
    names = launch.kernel.arg_names
    given = [name for name in names if name not in launch.constants]
    signature: dict[str, str] = dict.fromkeys(names, "constexpr")
    constants: dict[tuple[int, ...], Any] = {
        (names.index(name),): value for name, value in launch.constants.items()
    }
    attributes = {}
    for name, value in zip(given, launch.arguments, strict=True):
        at, plain = (names.index(name),), name in ("rows", "outputs")  # these are not specialised
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[at] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, TensorDescriptor):
            height, width = value.block_shape
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{height},{width}]>"
        elif value is None or (value == 1 and not plain):
            constants[at] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not plain:
                attributes[at] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "launch_pdl": launch.constants["PDL"]}
    if launch.registers:
        options["maxnreg"] = launch.registers
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32), options=options,
    )  # fmt: skip
    registers, spilled = resources(compiled.asm["cubin"])
    return Compiled(launch, compiled.asm["ptx"], compiled.metadata.shared, registers, spilled)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(problem: Problem) -> DeviceWeight:
    outputs, inputs, dtype = problem.outputs, problem.inputs, problem.compute
    pairs = -(-inputs // 64)
    if problem.kind == "int8":
        values, words = _meta(outputs, inputs, dtype=torch.int8), _meta(pairs, outputs, dtype=torch.int32)
        return DeviceWeight("int8", outputs, inputs, dtype, values, words)
    if problem.kind == "int4":
        values, words = (
            _meta(outputs, 32 * pairs, dtype=torch.uint8),
            _meta(pairs, outputs, dtype=torch.int64),
        )
        return DeviceWeight("int4", outputs, inputs, dtype, values, words)
    return DeviceWeight("dense", outputs, inputs, dtype, _meta(outputs, inputs, dtype=dtype))


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            command = [os.path.join(_TOOLS, "cuobjdump"), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None, None
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)

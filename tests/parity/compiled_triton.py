"""Compile kernels for a GPU that is not there (a process that imports this must not interpret them)."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = 227 << 10
"""Bytes that a program may have on an H100."""


def compile_for_h100(
    kernel: Any, types: str, constants: dict[str, Any], *, warps: int = 4, stages: int = 2
) -> dict[str, str]:
    """Compile for sm_90 as a launch would and return the stages' code by name.

    Args:
        types: the types of the arguments that are not constants, in order: `*bf16 *i32 i32 i32! fp32`; pointers, and
            integers marked `!`, are divisible by 16.
    """
    names = kernel.arg_names
    given = iter(types.split())
    of = {name: "constexpr" if name in constants else next(given) for name in names}
    assert not list(given), "more types than arguments"
    source = ASTSource(
        kernel,
        {name: kind.rstrip("!") for name, kind in of.items()},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if of[name].startswith("*") or of[name].endswith("!")
        },
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )
    assert compiled.metadata.shared <= SHARED_MEMORY, (kernel, constants, compiled.metadata.shared)
    return compiled.asm

"""Compile kernels for a GPU that is not there: `python compiled_triton.py` in a process that does not interpret them."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = 227 << 10
"""Bytes that a program may have on an H100."""


def compile_kernel(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int = 4, stages: int = 2
) -> Any:
    """Compile for sm_90 as a launch would: pointers and strides divisible by 16, all else as its default type says.

    Args:
        constants: the kernel's constexpr arguments.
        types: the others' types, by name: "*fp32", "*i32", "i32", "fp32"; a trailing "!" for integers divisible by 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name].rstrip("!") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and (types[name].startswith("*") or types[name].endswith("!"))
    }
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )
    assert compiled.metadata.shared <= SHARED_MEMORY, (kernel.__name__, constants, compiled.metadata.shared)
    return compiled

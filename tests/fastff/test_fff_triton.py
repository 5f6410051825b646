"""The Triton kernels on a machine without a GPU: interpreted against the plain twin, and compiled for an H100.

Triton decides at import whether it interprets, so `triton_cases.py` runs in a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from shoestring.fastff import triton_inference as inference  # noqa: E402
from shoestring.fastff import triton_kernels, triton_training  # noqa: E402
from shoestring.fastff.triton_inference import Plan, choose  # noqa: E402

CASES = Path(__file__).with_name("triton_cases.py")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


def assert_cases_pass(**environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
        str(CASES),
    ]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_interpreted_kernels() -> None:
    assert_cases_pass(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_device() -> None:
    assert_cases_pass(TRITON_INTERPRET="0")


class Recorder:
    """Stands in for `launch`: keeps what each kernel would be compiled from."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple] = {}

    def __call__(self, kernel, grid, *arguments, warps: int = 4, stages: int = 3, **constants) -> None:
        signature = dict.fromkeys(constants, "constexpr")
        constants, aligned = dict(constants), {}
        for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            signature[name] = "i32"
            if value is None:
                signature[name], constants[name] = "constexpr", None
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                aligned[(index,)] = [["tt.divisibility", 16]]
        options = {"num_warps": warps, "num_stages": stages}
        key = f"{kernel.__name__} {sorted(signature.items())} {sorted(map(str, constants.items()))} {options}"
        self.calls[key] = (kernel, signature, constants, aligned, options)

    def compiled(self) -> Iterator[tuple[str, object]]:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        for key, (kernel, signature, constants, aligned, options) in self.calls.items():
            source = ASTSource(kernel, signature, constants, aligned)
            yield key, compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize(
    ("tokens", "trees", "depth", "width", "dtype", "bias"),
    [
        (16384, 1, 11, 768, torch.bfloat16, True), (128, 1, 6, 48, torch.float32, True),
        (4096, 1, 13, 8192, torch.float16, False),
    ],
    ids=str,
)  # fmt: skip
def test_kernels_compile_for_sm90(tokens, trees, depth, width, dtype, bias, monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(triton_kernels, "launch", recorder)
    monkeypatch.setattr(triton_training, "launch", recorder)
    nodes = 2 ** (depth + 1) - 1
    x = torch.empty(tokens, width, dtype=dtype)
    w_in = torch.empty(trees, nodes, width, dtype=dtype)
    b_in = torch.empty(trees, nodes, dtype=dtype) if bias else None
    for levels in (1, 2, 3):
        inference.path(x, w_in, b_in, w_in, levels_per_step=levels)
    inference.grouped(x, w_in, b_in, w_in)
    leaves = [tensor.requires_grad_() for tensor in (x, w_in, b_in) if tensor is not None]
    torch.autograd.grad(triton_training.apply(x, w_in, b_in, w_in).sum(), leaves)
    names = set()
    for key, compiled in recorder.compiled():
        names.add(key.split()[0])
        assert compiled.metadata.shared <= 227 << 10, key
    assert {"path_kernel", "group_forward_kernel", "group_backward_kernel", "weight_gradient_kernel"} <= names


def test_the_way_through_depends_on_the_batch() -> None:
    ways = [choose(batch, 768, 11, torch.bfloat16).kind for batch in (1, 8, 128, 1024, 16384)]
    assert ways[0] == "path"
    assert ways[-1] == "grouped"
    assert ways == sorted(ways, reverse=True)  # paths first, groups from some batch on
    assert (
        choose(1, 768, 11, torch.bfloat16).levels_per_step
        > choose(512, 768, 11, torch.bfloat16).levels_per_step
    )
    assert choose(16384, 768, 20, torch.bfloat16).kind == "path"  # deeper than grouping goes
    assert choose(512, 768, 0, torch.bfloat16, trees=3072) == Plan("masked")


def test_the_benchmark_fills_its_table() -> None:
    from benchmarks.fast_feedforward_gpu import cell
    from benchmarks.fast_feedforward_tables import gpu_parts

    times = {"dense": 30.0, "dense_fused": 24.0, "path": 16.0, "path2": 12.0, "path3": 12.0, "grouped": 20.0}
    shapes = [(1, 768, 11), (16384, 768, 11), (1, 1024, 13)]
    step = {"batch": 4096, "width": 768, "depth": 11, "ms": {"ours": 2.0, "masked": 3.0, "dense": 1.0}}
    result = {
        "table": [cell(*shape, times) for shape in shapes], "training": [step], "dtype": "bfloat16",
        "machine": "a GPU", "commit": "0",
    }  # fmt: skip
    inference_map, training_step = gpu_parts("a-file.json", result)
    assert "|  | 1 | 16,384 |\n" in inference_map
    assert "| depth 11, width 768 | 12.0 us, 2.00x | 20.0 us, 1.20x |\n" in inference_map
    assert "| depth 13, width 1024 | 12.0 us, 2.00x |  |\n" in inference_map
    assert "| 2.00 ms | 3.00 ms | 1.00 ms | 1.50x | 0.50x |" in training_step


def test_without_triton_the_error_is_the_remedy(monkeypatch) -> None:
    from shoestring.errors import MissingDependencyError

    monkeypatch.setattr(triton_kernels, "triton", None)
    x, w = torch.zeros(1, 4), torch.zeros(1, 3, 4)
    with pytest.raises(MissingDependencyError, match="pip install triton"):
        inference.path(x, w, None, w)

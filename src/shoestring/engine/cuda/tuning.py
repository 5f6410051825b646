"""How a few-row product is cut into programs: a heuristic for any shape, and measured winners where there are some.

The times to beat are memory's: enough bytes must be under way on every multiprocessor (some 32 KB each), and small matrices
have so few that they should all be asked for at once. Winners lie in `tuned/MACHINE.json`, written by
`python -m benchmarks.few_row_matmul --tune`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shoestring.errors import RequestError, suggest

__all__ = ["MAX_ROWS", "LaunchConfig", "Problem", "Tuning", "candidates", "heuristic"]

MAX_ROWS = 256
"""More rows than this are a prefill's, and go to the library's product."""

_BUCKETS = (1, 16, 32, 64, 128, 256)
_FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class LaunchConfig:
    """How one product is launched.

    Args:
        kernel: "one_row" (ordinary cores) or "few_rows" (tensor cores).
        block_n, block_k, block_m: outputs, inputs and rows of a tile.
        split_k: programs that share a tile's inputs; needs a workspace.
        warps, stages: as Triton has them.
        unroll: one_row's trips that are laid out together; 0: all.
        lines: under programmatic launch, lines of 128 bytes of each row that are fetched into the L2 cache in advance.
        fuse_norm: take an RMSNorm on the way; else a small kernel in front does (needs a workspace).
        ptx: unpack int4 by hand-written instructions.
    """

    kernel: str
    block_n: int
    block_k: int
    block_m: int = 16
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    unroll: int = 0
    lines: int = 0
    fuse_norm: bool = True
    ptx: bool = True


@dataclass(frozen=True)
class Problem:
    """One product: [rows, K] x [N, K], `kind` "bfloat16", "float16", "float32", "int8" or "int4"."""

    outputs: int
    inputs: int
    rows: int
    kind: str
    gated: bool = False
    compute: torch.dtype = torch.bfloat16

    @property
    def bucket(self) -> int:
        """The number of rows that configurations are kept for."""
        return next((bucket for bucket in _BUCKETS if self.rows <= bucket), _BUCKETS[-1])

    @property
    def key(self) -> str:
        """The name of its configuration in a file."""
        wide = "/float32" if self.compute == torch.float32 and self.kind.startswith("int") else ""
        return f"{self.kind}{wide} {self.outputs}x{self.inputs} rows {self.bucket}{' gated' if self.gated else ''}"

    @property
    def row_bytes(self) -> float:
        """Bytes of one output's weights, scales left out."""
        size = {"int8": 1.0, "int4": 0.5, "float32": 4.0}.get(self.kind, 2.0)
        return self.inputs * size * (2 if self.gated else 1)


@dataclass(frozen=True)
class Tuning:
    """Configurations by problem, and whether kernels start before the one in front has ended.

    Args:
        configs: by `Problem.key`; others follow the heuristic.
        pdl: programmatic dependent launch (Hopper): kernels of a chain overlap their starts. Every kernel behind one of
            ours is safe with it as long as it is launched in the ordinary way, or waits as ours do.
    """

    configs: Mapping[str, LaunchConfig] = field(default_factory=dict)
    pdl: bool = False

    def config(self, problem: Problem, processors: int = 132) -> LaunchConfig:
        """The measured winner, or the heuristic's."""
        return self.configs.get(problem.key) or heuristic(problem, processors)

    @classmethod
    def read(cls, path: Path) -> "Tuning":
        """From a file as `write` makes it.

        Raises: RequestError for a configuration with unknown fields.
        """
        data = json.loads(path.read_text())
        known = [one.name for one in fields(LaunchConfig)]
        for key, config in data["configs"].items():
            for name in config.keys() - set(known):
                raise RequestError(f"{path}: {key!r} has an unknown field {name!r}{suggest(name, known)}")
        return cls(
            {key: LaunchConfig(**config) for key, config in data["configs"].items()}, data.get("pdl", False)
        )

    def write(self, path: Path) -> None:
        """Write it as JSON, only what differs from the defaults."""
        configs: dict[str, Any] = {}
        for key, config in sorted(self.configs.items()):
            defaults = asdict(LaunchConfig(config.kernel, config.block_n, config.block_k))
            always = ("kernel", "block_n", "block_k")
            configs[key] = {
                name: value
                for name, value in asdict(config).items()
                if name in always or value != defaults[name]
            }
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(config)}" for key, config in configs.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{\n "pdl": {json.dumps(self.pdl)},\n "configs": {{\n{lines}\n }}\n}}\n')

    @classmethod
    def of_machine(cls, device: torch.device) -> "Tuning":
        """What was measured on this kind of GPU, where it was."""
        if device.type != "cuda":
            return cls()
        return _of_name(torch.cuda.get_device_name(device).lower().replace(" ", "-"))


@cache
def _of_name(name: str) -> Tuning:
    path = _FOLDER / f"{name}.json"
    return Tuning.read(path) if path.is_file() else Tuning()


def heuristic(problem: Problem, processors: int = 132) -> LaunchConfig:
    """A configuration that should do for any shape."""
    if problem.rows == 1:
        return _one_row(problem, processors)
    return _few_rows(problem, processors)


def _one_row(problem: Problem, processors: int) -> LaunchConfig:
    outputs, inputs = problem.outputs, problem.inputs
    smallest = 4 if problem.kind in ("bfloat16", "float16", "float32") else 8
    block_n = smallest
    while block_n < 16 and outputs > 4 * processors * block_n:
        block_n *= 2
    if problem.gated:
        block_n = max(smallest, block_n // 2)
    widest = {"int8": 512, "int4": 1024}.get(problem.kind, 512)
    block_k = next((size for size in (1024, 512, 256, 128, 64) if size <= widest and inputs % size == 0), 128)
    if problem.kind == "int8" and inputs % block_k and inputs % 32 == 0:
        block_k = 32 if inputs < 128 else 128
    trips = -(-inputs // block_k)
    vector = {"int8": 16, "int4": 32, "float32": 4}.get(problem.kind, 8)  # weights of a 16-byte load
    warps = max(1, min(4, block_n * block_k // (32 * vector)))
    return LaunchConfig("one_row", block_n, block_k, 1, warps=warps, unroll=0 if trips <= 9 else 4, lines=2)


def _few_rows(problem: Problem, processors: int) -> LaunchConfig:
    outputs, inputs, rows = problem.outputs, problem.inputs, problem.bucket
    quantised = problem.kind.startswith("int")
    wide = problem.compute == torch.float32 or problem.kind == "float32"
    block_m = min(rows, 32 if wide else 64 if rows <= 64 else 128)
    if outputs >= 64 * processors // 4 and not wide:
        block_n = 128 if rows >= 64 and not problem.gated else 64
    else:
        block_n = 32 if outputs >= 16 * processors // 2 else 16
        if rows >= 64:
            block_n = max(block_n, 32)
    if quantised:
        sizes = (128, 64)
    else:
        sizes = (64,) if block_m >= 64 or wide else (128, 64)
    block_k = next((size for size in sizes if inputs % size == 0), 64)
    tiles = -(-outputs // block_n) * -(-rows // block_m)
    trips = -(-inputs // block_k)
    split_k = 1
    while tiles * split_k * 2 <= 2 * processors and trips // (split_k * 2) >= (4 if block_n >= 64 else 6):
        split_k *= 2
    tile_bytes = block_n * problem.row_bytes / inputs * block_k + 2 * block_m * block_k
    stages = 2 if wide else max(2, min(5, int(64e3 / tile_bytes)))
    warps = 4 if block_n >= 64 or block_m >= 64 else 2 if block_n == 32 else 1
    if wide or block_m * block_n > 64 * 128:
        warps = 8
    return LaunchConfig(
        "few_rows", block_n, block_k, block_m, split_k, warps, stages, lines=2, fuse_norm=rows <= 16
    )


def candidates(problem: Problem, processors: int = 132) -> list[LaunchConfig]:
    """Configurations worth measuring, the heuristic's first."""
    base = heuristic(problem, processors)
    found = [base]

    def add(**changes: Any) -> None:
        changed = replace(base, **changes)
        if changed not in found:
            found.append(changed)

    outputs, inputs = problem.outputs, problem.inputs
    few = outputs * problem.row_bytes < 8e6
    if problem.rows == 1:
        for block_n in (2, 4, 8, 16, 32):
            enough = processors // 2 <= -(-outputs // block_n) <= 64 * processors
            if enough and block_n >= (8 if problem.kind.startswith("int") else 2):
                add(block_n=block_n, warps=max(1, min(8, base.warps * block_n // base.block_n)))
        add(warps=base.warps * 2)
        add(unroll=2 if base.unroll else 4)
        add(unroll=2, stages=5)
        for block_k in (2 * base.block_k, base.block_k // 2):
            if inputs % min(block_k, inputs) == 0 and block_k >= 64 and block_k <= 2048:
                add(block_k=block_k, unroll=0 if inputs // block_k <= 9 else 4)
        # Tensor cores with fifteen idle rows, where unpacking is the bottleneck or splitting helps.
        tensor = _few_rows(replace(problem, rows=16), processors)
        found += [tensor, replace(tensor, split_k=1), replace(tensor, block_n=64, warps=4)]
    else:
        for block_n, warps in ((16, 1), (32, 2), (64, 4), (128, 4), (128, 8)):
            if -(-outputs // block_n) >= processors // 4 or block_n <= 32:
                for block_k in (64, 128) if inputs % 128 == 0 else (64,):
                    split_k = 1
                    while -(-outputs // block_n) * split_k < (processors if few else 2 * processors):
                        split_k *= 2
                    split_k = min(split_k, max(1, inputs // block_k // 2), 16)
                    stages = 6 if block_n * block_k <= 64 * 64 else 4
                    add(
                        block_n=block_n, warps=warps, block_k=block_k, stages=stages, split_k=1 << split_k.bit_length() - 1
                    )  # fmt: skip
        add(split_k=1)
        add(split_k=base.split_k * 2)
        add(stages=base.stages + 2)
    return list(dict.fromkeys(found))[:12]

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

__all__ = [
    "MAX_ROWS",
    "TUNED",
    "LaunchConfig",
    "Problem",
    "Tuning",
    "few_rows",
    "heuristic",
    "of_gpu",
    "one_row",
    "split_to_fill",
]

MAX_ROWS = 256
"""More rows than this are a prefill's, and go to the library's product."""

_BUCKETS = (1, 8, 16, 24, 32, 64, 128, 256)
TUNED = Path(__file__).parent / "tuned"
"""Where a machine's winners lie."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one product is launched.

    Args:
        kernel: "one_row" (ordinary cores), "few_rows" (tensor cores), "whole_rows" (these, all inputs in one trip),
            "wide_tiles" (these, many rows, dense weights, all brought by the copy engine) or "fragments" (these, quantised
            weights straight into their registers); the last two for rows of the computing type.
        block_n, block_k, block_m: outputs, inputs and rows of a tile.
        split_k: programs that share a tile's inputs; needs a workspace.
        warps, stages: as Triton has them; fragments' stages: 2 to fetch a trip's weights while the one before is computed.
        unroll: one_row's and fragments' trips that are laid out together; 0: all of one_row's.
        lines: under programmatic launch, lines of 128 bytes of each row that are fetched into the L2 cache in advance.
        fuse_norm: take an RMSNorm on the way; else a small kernel in front does (needs a workspace).
        ptx: unpack integers by hand-written instructions.
        written: round quantised weights to the computing type, and multiply as with dense ones; else a group's integers.
        tma: let Hopper's copy engine bring dense weights, and, with these and `written` ones, rows that need no norm on
            the way.
        slices: whole_rows' pieces of the inputs, which warps multiply beside one another.
        tail: whole_rows' inputs behind the first `block_k`, and wide tiles' outputs behind the first `block_n`, so that
            they need not be rounded up to a power of two.
        late: under programmatic launch, let the kernel behind one on the tensor cores start when that has waited, not at
            once: its programs then hold no places, and spread over the multiprocessors.
        registers: the most that a thread may have, so that more programs run at once; 0: as many as it wants.
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
    written: bool = False
    tma: bool = False
    slices: int = 1
    tail: int = 0
    late: bool = False
    registers: int = 0

    @property
    def width(self) -> int:
        """A program's outputs."""
        return self.block_n + (self.tail if self.kernel == "wide_tiles" else 0)


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
    def tile_rows(self) -> int:
        """The bucket's rows, rounded up to a power of two, as a tile has them."""
        return 1 << (self.bucket - 1).bit_length()

    @property
    def key(self) -> str:
        """The name of its configuration in a file."""
        wide = "/float32" if self.compute == torch.float32 and self.quantised else ""
        return f"{self.kind}{wide} {self.outputs}x{self.inputs} rows {self.bucket}{' gated' if self.gated else ''}"

    @property
    def quantised(self) -> bool:
        """Whether the weights are integers."""
        return self.kind.startswith("int")

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
        capability: the GPU's, that it was measured on; None: unknown.
    """

    configs: Mapping[str, LaunchConfig] = field(default_factory=dict)
    pdl: bool = False
    capability: tuple[int, int] | None = None

    def config(self, problem: Problem, processors: int = 132) -> LaunchConfig:
        """The measured winner; where there is none, that of the next greater number of rows, or the heuristic's."""
        found = self.configs.get(problem.key)
        if found is None and 1 < problem.rows < _BUCKETS[-1]:
            found = self.configs.get(replace(problem, rows=problem.bucket + 1).key)
        return found or heuristic(problem, processors, copies=(self.capability or (0, 0))[0] == 9)

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
        capability = data.get("capability")
        return cls(
            {key: LaunchConfig(**config) for key, config in data["configs"].items()},
            data.get("pdl", False),
            None if capability is None else (capability[0], capability[1]),
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
        head = f' "capability": {json.dumps(self.capability)},\n "pdl": {json.dumps(self.pdl)},\n'
        path.write_text(f'{{\n{head} "configs": {{\n{lines}\n }}\n}}\n')

    @classmethod
    def of_machine(cls, device: torch.device) -> "Tuning":
        """What was measured on this kind of GPU, else on one of the same compute capability, else nothing."""
        if device.type != "cuda":
            return cls()
        return of_gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


@cache
def of_gpu(name: str, capability: tuple[int, int], folder: Path = TUNED) -> Tuning:
    """The winners of a GPU of this name, else those of the first one of its capability, else none."""
    path = folder / f"{name.lower().replace(' ', '-')}.json"
    if path.is_file():
        return Tuning.read(path)
    others = (Tuning.read(other) for other in sorted(folder.glob("*.json")))
    return next((tuning for tuning in others if tuning.capability == capability), Tuning())


def heuristic(problem: Problem, processors: int = 132, *, copies: bool = False) -> LaunchConfig:
    """A configuration that should do for any shape. `copies`: the GPU has Hopper's copy engine."""
    if copies and problem.quantised and problem.tile_rows >= 32 and problem.compute != torch.float32:
        block_m = min(problem.tile_rows, 64)
        split_k = split_to_fill(problem, 64, 64, 4 * processors)
        return LaunchConfig(
            "few_rows", 64, 64, block_m, split_k, stages=4, lines=2, fuse_norm=False, written=True, tma=True
        )
    if copies and not problem.quantised and problem.compute != torch.float32 and problem.bucket > 16:
        wide = _wide_tiles(problem, processors)
        if wide is not None:
            return wide
    if problem.quantised and problem.compute != torch.float32:
        if problem.rows == 1:
            return _fragments_of_a_row(problem, processors)
        if problem.bucket <= 16 and problem.inputs > 2048:
            return _fragments_of_rows(problem, processors)
    # Unpacking wide rows is the tensor cores' work: they take quantised weights as integers.
    if problem.rows == 1 and (not problem.quantised or problem.inputs <= 2048):
        return one_row(problem, processors)
    return few_rows(problem, processors, copies=copies)


def _wide_tiles(problem: Problem, processors: int) -> LaunchConfig | None:
    """One wave of programs, as wide as that makes them: else two programs at once, or shares of the inputs. None where
    multiprocessors would be left without one, and for narrow matrices, whose products leave rows for the next norm.
    """
    if problem.outputs <= 2048:
        return None
    matrices, block_m = 2 if problem.gated else 1, min(problem.tile_rows, 128) if problem.bucket > 64 else 64
    rows = -(-problem.tile_rows // block_m)

    def launch(block_n: int, tail: int, split_k: int = 1, together: int = 1) -> LaunchConfig:
        outputs = (block_n + tail) * matrices
        block_k = 128 if block_m == 64 and outputs <= 192 else 64
        stages = min(8, 220_000 // together // (2 * block_k * (outputs + block_m)))
        warps = 4 if outputs * block_m <= 192 * 64 and split_k == 1 else 8
        return LaunchConfig(
            "wide_tiles", block_n, block_k, block_m, split_k, warps, stages, lines=2, fuse_norm=False, tma=True, tail=tail
        )  # fmt: skip

    def tiles(width: int) -> int:
        return -(-problem.outputs // width) * rows

    for block_n, tail in ((64, 0), (64, 32), (128, 0), (128, 64)):
        if tiles(block_n + tail) <= processors:
            if tiles(block_n + tail) >= 0.7 * processors and (block_n + tail) * matrices <= 192:
                return launch(block_n, tail)
            break
    few = tiles(64)
    if few > processors:
        wide = 64 if problem.gated else 128
        waves = -(-tiles(wide) // (2 * processors))
        return launch(wide, 0, together=2) if tiles(wide) >= 0.7 * waves * 2 * processors else None
    split_k = min(processors // few, problem.inputs // 512)
    return launch(64, 0, split_k) if problem.bucket > 32 and few * split_k >= 0.7 * processors else None


def _fragments_of_a_row(problem: Problem, processors: int) -> LaunchConfig:
    """Two tiles of 16 outputs (one where outputs are few or matrices two), and warps enough to have much under way."""
    block_n = 16 if problem.gated or problem.outputs < 32 * processors else 32
    warps = _warps_to_fill(problem, block_n, processors)
    while 256 * warps >= 2 * problem.inputs and warps > 1:
        warps //= 2
    blocks = (
        2 if warps == 8 and 2048 < problem.inputs <= 4096 and problem.kind == "int4" else 1
    )  # all at once
    trips = -(-problem.inputs // (256 * warps * blocks))
    unroll = 2 if problem.kind == "int4" and trips >= 4 and warps < 8 else 1
    return LaunchConfig(
        "fragments", block_n, 256 * warps * blocks, 1, warps=warps, stages=2, unroll=unroll, fuse_norm=False
    )


def _fragments_of_rows(problem: Problem, processors: int) -> LaunchConfig:
    """Up to 16 rows. With more than 8 there are registers for the weights of one trip, not of two."""
    many = problem.bucket > 8
    block_n = 16 if many or problem.gated or problem.outputs < 32 * processors else 32
    warps = max(_warps_to_fill(problem, block_n, processors), 2 if many else 4)
    chunks = (4 if warps < 8 and not problem.gated else 2) if many else (1 if problem.gated else 2)
    block_m = 16 if many else 8
    return LaunchConfig(
        "fragments",
        block_n,
        64 * warps * chunks,
        block_m,
        warps=warps,
        stages=1 if many else 2,
        fuse_norm=False,
    )


def _warps_to_fill(problem: Problem, block_n: int, processors: int) -> int:
    """Warps of a program such that there are some eight for each multiprocessor."""
    tiles = -(-problem.outputs // block_n)
    return next((warps for warps in (2, 4) if tiles * warps >= 8 * processors), 8)


def one_row(problem: Problem, processors: int = 132) -> LaunchConfig:
    """A launch of the kernel that takes one row, on the ordinary cores."""
    outputs, inputs = problem.outputs, problem.inputs
    block_n = 4
    while block_n < 8 and outputs >= 64 * processors * block_n:
        block_n *= 2
    if inputs <= 2048:  # one trip: every weight is asked for before the first arrives
        block_k = max(64, 1 << (inputs - 1).bit_length())
        return LaunchConfig("one_row", block_n, block_k, 1, warps=min(8, max(1, block_k // 256)), stages=1)
    block_k = next((size for size in (512, 256, 128) if inputs % size == 0), 256)
    unroll = 2 if problem.gated else 0 if inputs // block_k <= 9 else 4
    return LaunchConfig("one_row", block_n, block_k, 1, warps=4, stages=1, unroll=unroll, lines=8)


def few_rows(problem: Problem, processors: int = 132, *, copies: bool = False) -> LaunchConfig:
    """A launch of the kernel that takes any product. `copies`: as for `heuristic`."""
    outputs, inputs = problem.outputs, problem.inputs
    rows = max(8, problem.tile_rows)
    wide = problem.compute == torch.float32  # no tensor cores
    block_m = min(rows, 32 if wide else 64)
    if outputs >= 16 * processors and not wide:
        block_n = 128 if rows >= 64 and not problem.gated else 64
    else:
        block_n = 16 if outputs < 16 * processors // 2 and rows < 64 else 32
    sizes = (128, 64) if problem.quantised or (block_m < 64 and not wide) else (64,)
    block_k = next((size for size in sizes if inputs % size == 0), 64)
    tiles = -(-outputs // block_n) * -(-rows // block_m)
    trips = -(-inputs // block_k)
    # Unpacking needs more warps than streaming does.
    enough = (4 if problem.quantised else 2) * processors
    fewest = 4 if block_n >= 64 else 6
    split_k = 1
    while 4 * tiles * split_k <= 3 * enough and trips >= 2 * split_k * fewest:
        split_k *= 2
    tile_bytes = block_n * problem.row_bytes / inputs * block_k + 2 * block_m * block_k
    stages = 2 if wide else max(3, min(6, int(84e3 / tile_bytes)))
    if copies and not problem.quantised and not wide and block_m < 64 and tiles >= processors:
        # Enough programs in any case, and memory for one of them on each multiprocessor: as much under way as fits.
        split_k, stages = 1, max(2, min(6, int(200e3 / tile_bytes)))
    warps = 4 if block_n >= 64 or block_m >= 64 else 2 if block_n == 32 else 1
    if problem.quantised and block_m == 16:
        warps = min(warps, 2)  # the older tensor instructions, which take unpacked weights with fewer moves
    sums = block_m * block_n * (2 if problem.gated else 1) * (2 if problem.kind == "int4" else 1)
    if wide or sums > 64 * 96:
        warps = 8
    fuse_norm = rows <= 16 and inputs <= 1024
    return LaunchConfig(
        "few_rows", block_n, block_k, block_m, split_k, warps, stages, lines=2, fuse_norm=fuse_norm
    )


def split_to_fill(problem: Problem, block_n: int, block_k: int, programs: int) -> int:
    """Shares of a sum that make for about so many programs, none of them with less than six trips."""
    tiles, trips = -(-problem.outputs // block_n), -(-problem.inputs // block_k)
    return max(1, min(round(programs / tiles), trips // 6))

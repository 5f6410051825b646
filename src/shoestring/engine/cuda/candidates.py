"""Launches of a few-row product that are worth measuring (`benchmarks.few_row_matmul --tune`, `benchmarks.tune_step`)."""

from dataclasses import replace
from itertools import chain, product

import torch

from shoestring.engine.cuda.tuning import LaunchConfig, Problem, few_rows, heuristic, one_row, split_to_fill

__all__ = ["candidates"]


def candidates(problem: Problem, processors: int = 132, most: int = 12) -> list[LaunchConfig]:
    """Configurations worth measuring, the heuristic's first: at most `most` near it (of quantised weights a third of that),
    and those that just fill the card.
    """
    near = _near_heuristic(problem, processors)[: most // 3 if problem.quantised else most]
    others = [
        kind(problem, processors)
        for kind in (_filling, _wide_tiles, _unpacking, _cut_by_rows, _whole_rows, _fragments)
    ]
    return list(dict.fromkeys(chain(near, _by_slices(problem), *others)))


def _filling(problem: Problem, processors: int) -> list[LaunchConfig]:
    """Launches of just so many programs as run at once, with as much under way as fits."""
    if problem.compute == torch.float32 or problem.quantised or problem.bucket < 16:
        return []
    rows, itemsize = problem.tile_rows, problem.row_bytes / problem.inputs / (2 if problem.gated else 1)
    block_m = min(rows, 64)
    found = []
    for block_n, block_k, together in product((64, 128, 256), (64, 128, 256), (1, 2, 3)):
        tiles = -(-problem.outputs // block_n) * -(-rows // block_m)
        stage = (block_n * itemsize * (2 if problem.gated else 1) + 2 * block_m) * block_k
        stages = min(8, int(220_000 / together / stage))
        split_k = max(1, together * processors // tiles)
        trips = -(-problem.inputs // block_k)
        if stages < 2 or (split_k > 1 and trips < 4 * split_k):
            continue
        base = LaunchConfig(
            "few_rows", block_n, block_k, block_m, split_k, 4, stages, lines=2, fuse_norm=False
        )
        if block_k < 256:
            found.append(replace(base, tma=True))
            if block_n > 64:
                found.append(replace(base, tma=True, warps=8))
            if block_n == 128:
                found += [base, replace(base, warps=8)]
    return found


def _wide_tiles(problem: Problem, processors: int) -> list[LaunchConfig]:
    """Launches of one wave of programs, or of two that run at once, each as wide as that makes it."""
    if problem.compute == torch.float32 or problem.quantised or problem.bucket < 8 or problem.outputs < 2048:
        return []
    matrices = 2 if problem.gated else 1
    heights = (64,) if problem.bucket <= 64 else (64, 128)
    found = []
    for block_m, (block_n, tail), block_k, together, warps in product(
        heights, ((64, 0), (64, 32), (128, 0), (128, 32), (128, 64), (256, 0)), (64, 128), (1, 2), (4, 8)
    ):
        width = block_n + tail
        tiles = -(-problem.outputs // width) * -(-problem.tile_rows // block_m)
        stages = min(8, 220_000 // together // (2 * block_k * (width * matrices + block_m)))
        split_k = max(1, together * processors // tiles)
        trips = -(-problem.inputs // block_k)
        programs = tiles * split_k
        sums = width * matrices * block_m // (32 * warps)  # a thread's
        if stages < 2 or sums > 128 or sums < 16 or trips < 4 * split_k:
            continue
        if not 0.6 * together * processors <= programs <= 1.6 * together * processors:
            continue
        found.append(
            LaunchConfig(
                "wide_tiles", block_n, block_k, block_m, split_k, warps, stages, lines=2, fuse_norm=False, tma=True,
                tail=tail,
            )
        )  # fmt: skip
    return found


def _unpacking(problem: Problem, processors: int) -> list[LaunchConfig]:
    """Several rows, quantised weights: enough programs that some unpack while others wait."""
    if not problem.quantised or problem.compute == torch.float32 or problem.rows == 1:
        return []
    block_m = min(max(8, problem.tile_rows), 64)
    found = []
    if block_m >= 16:
        shapes = product(((64, 64, 4), (128, 64, 4), (64, 128, 3), (128, 128, 3)), (2, 3, 4))
        for (block_n, block_k, stages), programs in shapes:
            split_k = split_to_fill(problem, block_n, block_k, programs * processors)
            wide = block_n * block_m * (2 if problem.gated else 1) > 64 * 64
            for registers in (0, 128) if wide else (0,):
                found.append(
                    LaunchConfig(
                        "few_rows", block_n, block_k, block_m, split_k, 4, stages, lines=2, fuse_norm=False,
                        written=True, tma=True, registers=registers,
                    )
                )  # fmt: skip
    if block_m <= 16:
        for warps, (block_k, stages), programs in product((1, 2), ((64, 5), (128, 4)), (16, 24)):
            split_k = split_to_fill(problem, 32 * warps, block_k, programs // warps * processors)
            found.append(
                LaunchConfig(
                    "few_rows", 32 * warps, block_k, block_m, split_k, warps, stages, lines=2, fuse_norm=False
                )
            )
    return found


def _cut_by_rows(problem: Problem, processors: int) -> list[LaunchConfig]:
    """Many rows with a small matrix: its tiles are read anew for each tile of rows, from the L2 cache, by programs that
    would otherwise be missing.
    """
    rows = problem.bucket
    if problem.quantised or problem.compute == torch.float32 or not 16 <= rows <= 64:
        return []
    found = []
    for block_m, block_n, block_k, split_k, fuse_norm in product(
        (8, 16, 32, 64), (16, 32, 64), (64, 128), (1, 2, 4), (False, True)
    ):
        tiles = -(-problem.outputs // block_n)
        programs = tiles * -(-rows // block_m) * split_k
        trips = -(-problem.inputs // block_k)
        too_large = block_m > rows or tiles > processors or trips < 2 * split_k
        if too_large or not processors // 4 <= programs <= 3 * processors:
            continue
        stages = 6 if block_k == 64 else 4
        warps = 4 if block_n >= 64 else block_n // 16
        found.append(
            LaunchConfig(
                "few_rows", block_n, block_k, block_m, split_k, warps, min(stages, trips), lines=2, fuse_norm=fuse_norm
            )
        )  # fmt: skip
    return found


def _whole_rows(problem: Problem, processors: int) -> list[LaunchConfig]:
    """A few rows with a narrow matrix: all inputs in one trip, whose weights come while the kernel in front ends."""
    rows, inputs = problem.bucket, problem.inputs
    if problem.quantised or problem.compute == torch.float32 or not 8 <= rows <= 64 or inputs > 2048:
        return []
    heights = (8, 16, 32) if rows <= 32 else (16, 32)
    fuse_norm = heuristic(problem, processors).fuse_norm
    found = []
    for block_m, block_n, warps in product(heights, (16, 32), (2, 4, 8, 16)):
        programs = -(-problem.outputs // block_n) * -(-rows // block_m)
        if block_m > rows or not processors // 4 <= programs <= 3 * processors:
            continue
        for block_k, tail, slices in _slices(inputs, warps):
            # Weights and rows, by a program's threads.
            held = (block_k + tail) * (block_n * (2 if problem.gated else 1) + block_m)
            if held <= 12288 * warps:
                found.append(
                    LaunchConfig(
                        "whole_rows", block_n, block_k, block_m, warps=warps, fuse_norm=fuse_norm, slices=slices, tail=tail
                    )
                )  # fmt: skip
    return found


def _fragments(problem: Problem, processors: int) -> list[LaunchConfig]:
    """A few rows, quantised weights: each warp with inputs of its own, and as much under way as its registers hold."""
    if not problem.quantised or problem.compute == torch.float32 or problem.bucket > 32:
        return []
    block_m = 1 if problem.rows == 1 else max(8, problem.tile_rows)
    each = 256 if block_m == 1 else 64
    found = []
    for block_n, warps, shares, stages, unroll in product(
        (16, 32, 64), (1, 2, 4, 8), (1, 2, 4), (1, 2), (1, 2)
    ):
        block_k = each * warps * shares
        trips = -(-problem.inputs // block_k)
        held = block_n // 16 * shares * -(-block_m // 8) * (2 if problem.gated else 1)
        if problem.rows == 1 and problem.kind == "int8":
            held *= 2
        programs = -(-problem.outputs // block_n) * warps
        too_many = held > 8 or (held == 8 and stages == 2 and block_n < 64)
        too_few = held == 1 and problem.rows > 1
        fewest = min(3 * processors, -(-problem.outputs // 16))
        if too_many or too_few or not fewest <= programs <= 48 * processors or block_k >= 2 * problem.inputs:
            continue
        if (trips == 1 and stages == 1) or (unroll == 2 and (trips < 3 or held > 2)):
            continue
        found.append(
            LaunchConfig(
                "fragments", block_n, block_k, block_m, warps=warps, stages=stages, unroll=unroll, fuse_norm=False
            )
        )  # fmt: skip
    return found


def _slices(inputs: int, warps: int) -> list[tuple[int, int, int]]:
    """Inputs in front of a tail, in it, and slices of both, each for a warp or two: of at least 16 inputs in each part."""
    whole = 1 << (inputs - 1).bit_length()
    found = [(whole, 0, whole // size) for size in (32, 64)]
    most = whole // 2
    for slices in (max(warps // 2, 1), warps, 2 * warps):
        tail = max(1 << (inputs - most - 1).bit_length(), 16 * slices)
        if tail < most:
            found.append((most, tail, slices))
    return found


def _by_slices(problem: Problem) -> list[LaunchConfig]:
    """One row, quantised weights: each thread takes its slice of the inputs through all outputs of a tile."""
    if not problem.quantised or problem.rows != 1:
        return []
    found = []
    for warps, block_n in product((1, 2, 4), (4, 8, 16)):
        block_k = (1024 if problem.kind == "int4" else 512) * warps
        trips = -(-problem.inputs // block_k)
        one = LaunchConfig("one_row", block_n, block_k, 1, warps=warps, stages=1, lines=8)
        if trips <= 4:
            found.append(one)
        if trips > 1:
            found.append(replace(one, unroll=4))
    return found


def _near_heuristic(problem: Problem, processors: int) -> list[LaunchConfig]:
    found = [heuristic(problem, processors)]
    outputs, inputs = problem.outputs, problem.inputs
    few = few_rows(problem, processors)
    if problem.rows == 1:
        one = one_row(problem, processors)
        found.append(one)
        for block_n in (2, 4, 8, 16):
            if outputs // block_n >= processors // 2:
                found.append(replace(one, block_n=block_n))
        found += [replace(one, warps=one.warps * 2), replace(one, warps=max(1, one.warps // 2))]
        if one.block_k < inputs:
            found += [
                replace(one, unroll=2),
                replace(one, block_n=8, unroll=4),
                replace(one, block_n=2, unroll=0),
            ]
        found += [few, replace(few, fuse_norm=not few.fuse_norm)]
        if problem.quantised:
            found.insert(3, few)
    found += [replace(few, split_k=1), replace(few, fuse_norm=not few.fuse_norm)]
    if few.split_k * 2 * few.block_k <= inputs:
        found.append(replace(few, split_k=2 * few.split_k))
    for block_n, warps in ((16, 1), (32, 2), (64, 4), (128, 4), (128, 8)):
        if (block_n >= 128 and problem.bucket < 32) or (block_n <= 16 and outputs > 128 * processors):
            continue
        tiles = -(-outputs // block_n)
        split_k = 1
        while tiles * split_k * 2 <= few.split_k * -(-outputs // few.block_n) and split_k < 16:
            split_k *= 2
        found.append(
            replace(few, block_n=block_n, warps=max(warps, 4 if few.block_m >= 64 else 1), split_k=split_k)
        )
        if block_n in (32, 64):
            found.append(replace(found[-1], stages=min(8, few.stages + 2)))
    if inputs % 256 == 0:
        found.append(replace(few, block_k=2 * few.block_k, stages=max(2, few.stages // 2)))
    if few.block_k == 128:
        found.append(replace(few, block_k=64, stages=min(8, 2 * few.stages)))
    return list(dict.fromkeys(found))

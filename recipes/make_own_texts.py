"""Write the texts that `auto` drafts from with the bundled model: its own requests, its own answers.

python recipes/make_own_texts.py src/shoestring/decoding/texts/smollm2-135m.npz --device cuda --processes 6 --batch 16

Minutes on a GPU, where several processes fill each other's gaps; hours on a CPU.
"""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np

import shoestring
from shoestring.decoding.own_texts import keep_texts, write_texts

_APART = 1_000_000  # the numbers of the processes' first requests: so many they never make


def part(number: int, options: argparse.Namespace) -> np.ndarray:
    """What one of the processes writes."""
    model = shoestring.load("smollm2-135m", device=options.device, dtype="bfloat16")
    opening, ending = model.chat_frame()
    last = number == options.processes - 1
    return write_texts(
        model.runner, opening, ending, model.eos_ids, seconds=options.seconds,
        tokens=-(-options.tokens // options.processes), batch=options.batch, first=number * _APART,
        progress=(lambda done, most: print(f"\r{done} of {most} per cent", end="", flush=True)) if last else None,
    )  # fmt: skip


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=86400.0, help="stop earlier, with fewer tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--batch", type=int, default=8, help="texts that a process writes at a time, at most 16"
    )
    options = parser.parse_args()
    if options.processes == 1:
        parts = [part(0, options)]
    else:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            parts = pool.starmap(
                part, [(number, options) for number in range(options.processes)], chunksize=1
            )
    texts = np.concatenate(parts)
    keep_texts(options.output, texts)
    print(f"\n{len(texts):,} tokens, {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

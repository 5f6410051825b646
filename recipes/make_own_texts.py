"""Write the texts that `auto` drafts from with the bundled model: its own requests, its own answers (minutes on a CPU).

python recipes/make_own_texts.py src/shoestring/decoding/texts/smollm2-135m.npy
"""

import argparse
from pathlib import Path

import numpy as np

import shoestring
from shoestring.decoding.own_texts import write_texts


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=300_000)
    options = parser.parse_args()
    model = shoestring.load("smollm2-135m", dtype="bfloat16")
    opening, ending = model.chat_frame()
    texts = write_texts(
        model.runner, opening, ending, model.eos_ids, seconds=86400, tokens=options.tokens,
        progress=lambda done, most: print(f"\r{done} of {most} per cent", end="", flush=True),
    )  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    np.save(options.output, texts.astype(np.uint16))
    print()


if __name__ == "__main__":
    main()

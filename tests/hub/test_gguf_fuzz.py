"""Hostile GGUF files: whatever the bytes, the answer is a model or one of our errors, never a crash or another exception.

`SHOESTRING_FUZZ=10000` runs as many files; each goes through header, tokenizer, the native step's checks and a step.
"""

import os
import random
import struct
import warnings

import pytest
from folders import write_gguf

import shoestring
from shoestring.errors import ShoestringError

pytest.importorskip("shoestring._native", reason="built without the native part")

FILES = int(os.environ.get("SHOESTRING_FUZZ", "400"))
EXTREME = [
    0,
    1,
    2,
    31,
    33,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 60,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]


def mutated(whole: bytes, header: int, chance: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        # Mostly where the header is: weights may hold anything.
        at = chance.randrange(header if chance.random() < 0.9 else len(data))
        kind = chance.randrange(6)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.randrange(256)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", chance.choice(EXTREME))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", chance.choice(EXTREME) & 0xFFFFFFFF)
        elif kind == 4:
            del data[at : at + chance.choice([1, 4, 8, 100])]
        else:
            data[at:at] = chance.randbytes(chance.choice([1, 4, 8, 100]))
        if not data:
            break
    return bytes(data if chance.random() < 0.9 else data[: chance.randrange(len(data) + 1)])


def test_mutated_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    wholes = [
        write_gguf(tmp_path / f"{kind}.gguf", kind=kind).read_bytes()
        for kind in ("F32", "Q4_1", "Q8_0", "Q5_0")
    ]
    header = wholes[0].index(b"blk.1.ffn_down.weight") + 60
    chance = random.Random(int(os.environ.get("SHOESTRING_FUZZ_SEED", "0")))
    path = tmp_path / "fuzzed.gguf"
    ran, lines = 0, []
    for number in range(FILES):
        path.write_bytes(mutated(chance.choice(wholes), header, chance))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd settings make transformers warn
                model = shoestring.load(str(path), device="cpu")
                tokens = [token % model.runner.vocab_size for token in (3, 70, 90)]
                model.generate(tokens, decoding="autoregressive", max_new_tokens=2)
                ran += 1
        except ShoestringError as error:
            lines.append(str(error))
        except Exception as error:
            kept = os.environ.get("SHOESTRING_FUZZ_KEEP")
            if kept:
                path.rename(f"{kept}/{number}.gguf")
            raise AssertionError(f"file {number}: {type(error).__name__}: {error}") from error
    assert not [line for line in lines if "\n" in line]
    assert FILES // 20 < ran < FILES  # some mutations only touch names or weights; most must be noticed

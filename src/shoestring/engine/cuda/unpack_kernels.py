"""How Triton kernels turn packed integers into numbers: scales in pairs, int8, and the halves of int4's bytes.

PTX: "bf16", "fp16" or "": whether they are unpacked by hand-written instructions; "" is for the interpreter and
for float32.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = ["halves", "nibbles", "signed", "small", "spread_nibbles", "wide_bytes", "wide_nibbles"]

# Four bytes, eight nibbles -> eight numbers: a nibble becomes the last bits of 128 (bfloat16) or 1024 (float16).
_NIBBLES = """{
.reg .b32 a, b;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
lop3.b32 $0, a, 0x000F000F, MAGIC, 0xEA;
lop3.b32 $1, b, 0x000F000F, MAGIC, 0xEA;
shr.u32 a, a, 4;
shr.u32 b, b, 4;
lop3.b32 $2, a, 0x000F000F, MAGIC, 0xEA;
lop3.b32 $3, b, 0x000F000F, MAGIC, 0xEA;
}"""
_NIBBLES_BF16: tl.constexpr = tl.constexpr(_NIBBLES.replace("MAGIC", "0x43004300"))
_NIBBLES_FP16: tl.constexpr = tl.constexpr(_NIBBLES.replace("MAGIC", "0x64006400"))

# The same where any order will do: of two bytes' low halves, then of their high ones.
_SPREAD = """{
.reg .b32 a, b, c;
shr.u32 a, $4, 8;
shr.u32 b, $4, 4;
shr.u32 c, $4, 12;
lop3.b32 $0, $4, 0x000F000F, MAGIC, 0x6A;
lop3.b32 $1, a, 0x000F000F, MAGIC, 0x6A;
lop3.b32 $2, b, 0x000F000F, HIGH, 0x6A;
lop3.b32 $3, c, 0x000F000F, HIGH, 0x6A;
}"""


def _spread(low: int, high: int) -> tl.constexpr:
    """What the halves become the last bits of, by exclusive or."""
    return tl.constexpr(
        _SPREAD.replace("MAGIC", f"0x{low:04X}{low:04X}").replace("HIGH", f"0x{high:04X}{high:04X}")
    )


_SPREAD_INT4_BF16: tl.constexpr = _spread(0x4300, 0x4300)
_SPREAD_INT4_FP16: tl.constexpr = _spread(0x6400, 0x6400)
# The last bits of 2048 (bfloat16) and 16384 (float16) count sixteen; the fourth one has int8's sign the other way round.
_SPREAD_INT8_BF16: tl.constexpr = _spread(0x4300, 0x4508)
_SPREAD_INT8_FP16: tl.constexpr = _spread(0x6400, 0x7408)


def _as_floats(outputs: range, source: str, head: str, place: int) -> list[str]:
    """A word's first bytes as the bits of a fraction from 8 * `place` on, below the exponent of `head`."""
    return [
        f"prmt.b32 ${output}, {source}, {head}, 0x{0x7444 + ((byte - 4) << 4 * place):04X};"
        for byte, output in enumerate(outputs)
    ]


def _assembly(source: int, pack: int, *lines: str) -> tl.constexpr:
    """Lines that find the operand `source`, of so many bytes, in the register w."""
    word = f"mov.b32 w, ${source};" if pack == 4 else f"cvt.u32.u16 w, ${source};"
    return tl.constexpr("\n".join(["{", ".reg .b32 w, h;", word, *lines, "}"]))


def _nibbles_fp32(pack: int) -> tl.constexpr:
    """Bytes -> twice as many float32, the low halves first: a nibble becomes the last bits of a byte of 128's fraction."""
    return _assembly(
        2 * pack, pack, "shr.u32 h, w, 4;", "and.b32 w, w, 0x0F0F0F0F;", "and.b32 h, h, 0x0F0F0F0F;",
        *_as_floats(range(pack), "w", "0x43000000", 2), *_as_floats(range(pack, 2 * pack), "h", "0x43000000", 2),
    )  # fmt: skip


def _bytes_fp32(pack: int) -> tl.constexpr:
    """int8 -> as many float32, 2^15 + 128 above what they are."""
    return _assembly(pack, pack, "xor.b32 w, w, 0x80808080;", *_as_floats(range(pack), "w", "0x47000000", 1))


# Four bytes at a time where a thread has them in one register, two in the tensor cores' layout.
_NIBBLES_FP32_4: tl.constexpr = _nibbles_fp32(4)
_NIBBLES_FP32_2: tl.constexpr = _nibbles_fp32(2)
_BYTES_FP32_4: tl.constexpr = _bytes_fp32(4)
_BYTES_FP32_2: tl.constexpr = _bytes_fp32(2)


@triton.jit
def small(levels):
    """Integers of 0..255 in float32 without a slow conversion: the last bits of 2^23 + q."""
    return (levels.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def signed(levels):
    """Integers of -128..127 in float32."""
    bits = (levels.to(tl.uint8, bitcast=True) ^ 128).to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)


@triton.jit
def wide_bytes(levels, PTX: tl.constexpr, PACK: tl.constexpr):
    """Integers of -128..127 in float32, plus an offset: a sum then errs by 2^-9 of an integer, for 16-bit types only.

    PACK: bytes that a thread has side by side, 2 or 4.
    """
    if PTX == "":
        found = signed(levels)
        offset = 0.0
    else:
        offset = 32768.0 + 128.0
        if PACK == 4:
            found = tl.inline_asm_elementwise(_BYTES_FP32_4, "=f,=f,=f,=f,r", [levels], tl.float32, True, 4)
        else:
            found = tl.inline_asm_elementwise(_BYTES_FP32_2, "=f,=f,h", [levels], tl.float32, True, 2)
    return found, offset


@triton.jit
def wide_nibbles(pairs, PTX: tl.constexpr, PACK: tl.constexpr):
    """Low and high halves of bytes in float32, plus an offset. PACK: as for `wide_bytes`."""
    if PTX == "":
        low, high = small(pairs & 15), small(pairs >> 4)
        offset = 0.0
    else:
        offset = 128.0
        if PACK == 4:
            low, high = tl.inline_asm_elementwise(
                _NIBBLES_FP32_4, "=f,=f,=f,=f,=f,=f,=f,=f,r", [pairs], (tl.float32, tl.float32), True, 4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _NIBBLES_FP32_2, "=f,=f,=f,=f,h", [pairs], (tl.float32, tl.float32), True, 2
            )
    return low, high, offset


@triton.jit
def halves(words):
    """Two float16 out of a word's last 32 bits, as float32: the lower and the upper."""
    lower = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    upper = ((words >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return lower, upper


@triton.jit
def nibbles(pairs, COMPUTE: tl.constexpr, PTX: tl.constexpr):
    """Low and high halves of bytes, plus an offset, exact in COMPUTE."""
    if PTX == "bf16":
        low, high = tl.inline_asm_elementwise(
            _NIBBLES_BF16, "=r,=r,=r,=r,r", [pairs], (tl.bfloat16, tl.bfloat16), True, 4
        )
        offset = 128.0
    elif PTX == "fp16":
        low, high = tl.inline_asm_elementwise(
            _NIBBLES_FP16, "=r,=r,=r,=r,r", [pairs], (tl.float16, tl.float16), True, 4
        )
        offset = 1024.0
    else:
        low, high = (pairs & 15).to(COMPUTE), (pairs >> 4).to(COMPUTE)
        offset = 0.0
    return low, high, offset


@triton.jit
def spread_nibbles(words, KIND: tl.constexpr, COMPUTE: tl.constexpr, PTX: tl.constexpr):
    """Low and high halves of words' four bytes, exact in COMPUTE ([.., 2, 2]: [i, j] is of byte i + 2 j), and an offset.

    KIND 4: each is the offset above what it is. 8: both together are the offset above what the int8 is.
    """
    if PTX != "":
        if KIND == 8:
            a, b, c, d = tl.inline_asm_elementwise(
                _SPREAD_INT8_BF16 if PTX == "bf16" else _SPREAD_INT8_FP16, "=r,=r,=r,=r,r", [words],
                (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            offset = 128.0 + 2048.0 + 128.0 if PTX == "bf16" else 1024.0 + 16384.0 + 128.0
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _SPREAD_INT4_BF16 if PTX == "bf16" else _SPREAD_INT4_FP16, "=r,=r,=r,=r,r", [words],
                (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            offset = 128.0 if PTX == "bf16" else 1024.0
        low, high = pairs(tl.join(a, b), COMPUTE), pairs(tl.join(c, d), COMPUTE)
    else:
        both = tl.join(words, words >> 8)
        low, high = _small_pairs(both, COMPUTE), _small_pairs(both >> 4, COMPUTE)
        offset = 0.0
        if KIND == 8:  # 8 to 15 are negative
            high = tl.where(high < 8, high, high - 16) * 16
    return low, high.to(COMPUTE), offset


@triton.jit
def ones_like(words, COMPUTE: tl.constexpr, PTX: tl.constexpr):
    """Ones where `spread_nibbles` has halves of the words' bytes. Made the same way, so that they are laid out alike."""
    if PTX == "bf16":
        both = tl.inline_asm_elementwise("mov.b32 $0, 0x3F803F80;", "=r,r", [words], tl.int32, True, 1)
        ones = pairs(tl.join(both, both), COMPUTE)
    elif PTX == "fp16":
        both = tl.inline_asm_elementwise("mov.b32 $0, 0x3C003C00;", "=r,r", [words], tl.int32, True, 1)
        ones = pairs(tl.join(both, both), COMPUTE)
    else:
        ones = _small_pairs(tl.join(words * 0 + 0x10001, words * 0 + 0x10001), COMPUTE)
    return ones


@triton.jit
def pairs(words, COMPUTE: tl.constexpr):
    lower = (words & 0xFFFF).to(tl.uint16).to(COMPUTE, bitcast=True)
    upper = ((words >> 16) & 0xFFFF).to(tl.uint16).to(COMPUTE, bitcast=True)
    return tl.join(lower, upper)


@triton.jit
def _small_pairs(words, COMPUTE: tl.constexpr):
    return tl.join((words & 15).to(COMPUTE), ((words >> 16) & 15).to(COMPUTE))

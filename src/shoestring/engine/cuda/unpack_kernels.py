"""How Triton kernels turn packed integers into numbers: scales in pairs, int8, and the halves of int4's bytes.

PTX: "bf16", "fp16" or "": whether halves of bytes are unpacked by hand-written instructions; "" is for the interpreter and
for float32.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = ["halves", "nibbles", "signed", "small", "wide_nibbles"]

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
# Four bytes, eight nibbles -> eight numbers: a nibble becomes the last bits of 128 (bfloat16) or 1024 (float16).
_NIBBLES_BF16: tl.constexpr = tl.constexpr(_NIBBLES.replace("MAGIC", "0x43004300"))
_NIBBLES_FP16: tl.constexpr = tl.constexpr(_NIBBLES.replace("MAGIC", "0x64006400"))

# The same -> eight float32, the low halves first: a nibble becomes the first bits of the fraction of 1 + n / 16. Results
# are moved out last: they may lie where the bytes do.
_SHIFTS = (
    "shl.b32 19",
    "shl.b32 11",
    "shl.b32 3",
    "shr.u32 5",
    "shl.b32 15",
    "shl.b32 7",
    "shr.u32 1",
    "shr.u32 9",
)
_NIBBLES_FP32: tl.constexpr = tl.constexpr(
    "\n".join(
        [
            "{",
            ".reg .b32 a, b, c, d, e, f, g, h;",
            *(
                f"{shift} {name}, $8, {places};"
                for name, (shift, places) in zip("abcdefgh", map(str.split, _SHIFTS), strict=True)
            ),
            *(f"lop3.b32 {name}, {name}, 0x00780000, 0x3F800000, 0xEA;" for name in "abcdefgh"),
            *(f"mov.b32 ${index}, {name};" for index, name in enumerate("abcdefgh")),
            "}",
        ]
    )
)


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
def wide_nibbles(pairs, PTX: tl.constexpr):
    """Low and high halves n of bytes as v in float32, with n = unit * v - offset; then unit and offset."""
    if PTX != "":
        low, high = tl.inline_asm_elementwise(
            _NIBBLES_FP32, "=f,=f,=f,=f,=f,=f,=f,=f,r", [pairs], (tl.float32, tl.float32), True, 4
        )
        unit = 16.0
        offset = 16.0
    else:
        low, high = small(pairs & 15), small(pairs >> 4)
        unit = 1.0
        offset = 0.0
    return low, high, unit, offset


@triton.jit
def halves(words):
    """Two float16 out of 32 bits, as float32: the lower and the upper."""
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

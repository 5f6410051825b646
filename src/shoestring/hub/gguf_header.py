"""A GGUF file's metadata and tensor table, every count and offset checked against the file's size."""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoestring.errors import ModelFileError

__all__ = ["GgufHeader", "TensorEntry", "read_gguf_header"]

_FORMATS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 20
_MAX_DIMENSIONS = 4
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the table: its shape (ggml's order, fastest first) and its span in the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata["general.architecture"])

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of one whole GGUF file.

    Raises:
        ModelFileError: one line that names the file and what is wrong with it.
    """
    if (split := _SPLIT.search(path.name)) and int(split[1]) > 1:
        raise _split_error(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelFileError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Reader(path, view).header()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error


def _split_error(path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path} is one part of a split GGUF, which is not read: join the parts first "
        "(llama-gguf-split --merge) or use the safetensors"
    )


class _Reader:
    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.size, self.at = path, view, len(view), 4

    def header(self) -> GgufHeader:
        version = self._number("I")
        if version not in (2, 3):
            raise self._broken(f"version {version} is not 2 or 3")
        tensor_count, pair_count = self._count(self._number("Q"), 24), self._count(self._number("Q"), 13)
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        if not isinstance(metadata.get("general.architecture"), str):
            raise self._broken("it names no general.architecture")
        if metadata.get("split.count", 1) not in (0, 1):
            raise _split_error(self.path)
        table = [self._table_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise self._broken(f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {entry.name: entry for entry in (self._placed(start, *row) for row in table)}
        if len(tensors) != tensor_count or not tensors:
            raise self._broken(f"it lists {tensor_count} tensors, {len(tensors)} by different names")
        return GgufHeader(self.path, MappingProxyType(metadata), MappingProxyType(tensors))

    def _broken(self, reason: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is a broken GGUF file: {reason}")

    def _take(self, length: int) -> int:
        """Advance by `length` bytes; return where they start."""
        start = self.at
        if length > self.size - start:
            raise self._broken(f"it is cut short at byte {self.size}, in its header")
        self.at = start + length
        return start

    def _count(self, count: int, least_bytes: int) -> int:
        if count > _MAX_ENTRIES or count * least_bytes > self.size:
            raise self._broken(f"it claims {count} entries in {self.size} bytes")
        return count

    def _number(self, code: str) -> Any:
        start = self._take(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.view, start)[0]

    def _string(self) -> str:
        length = self._number("Q")
        start = self._take(length)
        return self.view[start : start + length].decode("utf-8", errors="replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _FORMATS:
            return self._number(_FORMATS[kind])
        if kind != _ARRAY or depth > 2:
            raise self._broken(f"its metadata has a value of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _FORMATS:
            code = f"<{count}{_FORMATS[inner]}"
            if count > self.size:
                raise self._broken(f"it claims {count} values in {self.size} bytes")
            return list(struct.unpack_from(code, self.view, self._take(struct.calcsize(code))))
        if count * 8 > self.size:
            raise self._broken(f"it claims {count} values in {self.size} bytes")
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _table_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._broken(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape, self._number("I"), self._number("Q")

    def _placed(
        self, start: int, name: str, shape: tuple[int, ...], ggml_type: int, offset: int
    ) -> TensorEntry:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
        except (ValueError, KeyError):
            raise self._broken(f"tensor {name!r} is of the unknown type {ggml_type}") from None
        elements = math.prod(shape)
        if elements % block:
            raise self._broken(f"tensor {name!r} has {elements} values, not a multiple of {block}")
        nbytes = elements // block * block_bytes
        if start + offset + nbytes > self.size:
            raise self._broken(
                f"it is cut short: tensor {name!r} ends at byte {start + offset + nbytes} of {self.size}"
            )
        return TensorEntry(name, shape, ggml_type, start + offset, nbytes)

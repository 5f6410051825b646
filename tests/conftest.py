"""Shared by all tests: where the data is, and quiet tokenizers."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: threads that spin while they wait make tiny steps 40 times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before Triton is imported: without a GPU its kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
_BESIDE = Path(__file__).parent.parent.parent / "shared" / "data"
if "SHOESTRING_DATA" not in os.environ and _BESIDE.is_dir():
    os.environ["SHOESTRING_DATA"] = str(_BESIDE)


@pytest.fixture(scope="session")
def smollm2():
    """The default model in fp32 (converted once, then from the cache)."""
    import shoestring

    return shoestring.load("smollm2-135m", device="cpu", dtype="float32")


@pytest.fixture(autouse=True, scope="session")
def short_own_texts():
    """Tiny models would write texts for six seconds each; a tenth of one shows as much."""
    from shoestring.decoding import own_texts

    own_texts.SECONDS = 0.1

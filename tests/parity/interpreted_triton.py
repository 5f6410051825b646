"""Import this before a module of Triton kernels: skips where there is no Triton, and mends its interpreter for NumPy 2.4.

`tests/conftest.py` has chosen the interpreter where there is no GPU. Its scalars are arrays of one element, which NumPy 2.4
no longer takes as the bounds of a `range`.
"""

import os
from typing import Any

import pytest
import torch

interpreter = pytest.importorskip("triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are neither interpreted nor run", allow_module_level=True)

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_index

"""The native module `fastattn._cpu`, loaded with the first kernel that runs, and what every call hands to it."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from fastattn import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/cpu/numeric.h


def other_dtype(dtype: torch.dtype) -> str:
    """Why a tensor of one that is not among DTYPES is not computed with."""
    return f"dtype {str(dtype).removeprefix('torch.')} (it has float16, bfloat16 and float32)"


@functools.cache
def load() -> ModuleType:
    """The module; FASTATTN_CPU_MODULE names the file of another build of it, as one with sanitizers."""
    if path := os.environ.get("FASTATTN_CPU_MODULE"):
        spec = importlib.util.spec_from_file_location("fastattn._cpu", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return native.load_cpu()


@functools.cache
def why_not() -> str | None:
    """Why `load` would raise; None if it would not."""
    return None if "FASTATTN_CPU_MODULE" in os.environ else native.why_no_cpu()


def threads() -> int:
    return torch.get_num_threads()


def matrix(t: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """(address, strides)"""
    return None if t is None else (t.data_ptr(), t.stride())


def entries(t: Tensor | None) -> tuple[int, int, list[int]] | None:
    """(address, dtype, strides) of a tensor that broadcasts: strides of 0 where a dimension has length 1."""
    if t is None:
        return None
    strides = [0 if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True)]
    return t.data_ptr(), DTYPES.get(t.dtype, 0), strides

"""What GPU there is, and the native module for it, loaded with the first kernel that runs."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from fastattn import native

EMULATE = os.environ.get("FASTATTN_EMULATE", "0") == "1"  # read once, as the answers are remembered
HOPPER = (9, 0)


def why_not(device: torch.device) -> str | None:
    """Why there are no kernels for tensors there; None if there are."""
    return _why_not(device)


@functools.cache
def _why_not(device: torch.device) -> str | None:
    if EMULATE and device.type == "cpu":
        return native.why_no_emulator()
    if device.type == "cpu":
        return "its kernels are for NVIDIA GPUs (FASTATTN_EMULATE=1 emulates them on a CPU, slowly)"
    if device.type != "cuda":
        return f"it has no kernels for device {device.type!r}"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    return native.why_not(capability(device))


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; of an emulated one that of Hopper."""
    return HOPPER if device.type == "cpu" else torch.cuda.get_device_capability(device)


@functools.cache
def load(device: torch.device) -> ModuleType:
    """The kernels' launchers."""
    return native.load_emulator() if device.type == "cpu" else native.load(capability(device))


def has_attention(device: torch.device) -> bool:
    """A module may have been compiled for sm_90, whose instructions are not all of Hopper's."""
    return device.type == "cpu" or hasattr(load(device), "attention_forward")


# As in the Triton backend: a compiler takes the answers as constants, and does not trace how they are found. It would
# look through functools.cache, so that these are plain functions.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def stream_of(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0

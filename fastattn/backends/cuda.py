"""Hand-written CUDA kernels (csrc/cuda), built for the card at hand by `python -m fastattn build`.

FASTATTN_EMULATE=1 runs the same kernel sources on CPU tensors, in the emulator of csrc/emulator: slowly, for tests.
The native module is loaded with the first kernel that runs, not with fastattn.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from fastattn import native
from fastattn.spec import AttentionInputs, AttentionSpec, Spec

NAME = "cuda"
COMPOSITE = False

EMULATE = os.environ.get("FASTATTN_EMULATE", "0") == "1"
UNASKED = os.environ.get("FASTATTN_CUDA", "0") == "1"
_HEAD_DIMS = (64, 96, 128, 192, 256)
_UNBOUNDED = 2**31 - 1  # a window side that hides nothing


def available(device: torch.device) -> str | None:
    return _available(device)


available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _available(device: torch.device) -> str | None:
    if EMULATE and device.type == "cpu":
        return native.why_no_emulator()
    if device.type == "cpu":
        return "its kernels are for NVIDIA GPUs (FASTATTN_EMULATE=1 emulates them on a CPU, slowly)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it has no kernels for {'AMD GPUs' if torch.version.hip else f'device {device.type!r}'}"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    return native.why_not(torch.cuda.get_device_capability(device))


def only_on_request(device: torch.device) -> str | None:
    if UNASKED:
        return None
    return "its kernels are proven in an emulator, not yet on a GPU: backend='cuda' or FASTATTN_CUDA=1 asks for them"


def unsupported(spec: Spec, device: torch.device) -> str | None:
    return "nothing yet"

"""Hand-written CUDA kernels (csrc/cuda), compiled for the GPU at hand by `python -m fastattn build`.

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
from fastattn.spec import AttentionInputs, AttentionSpec, CrossEntropySpec, NormSpec, SoftmaxSpec, Spec

NAME = "cuda"
COMPOSITE = False

EMULATE = os.environ.get("FASTATTN_EMULATE", "0") == "1"  # read once, as available() is remembered
WANTED = os.environ.get("FASTATTN_CUDA", "0") == "1"
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))  # of q and k, and of v
_HOPPER = (9, 0)
_ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def available(device: torch.device) -> str | None:
    return _available(device)


# As in the Triton backend: a compiler takes the answer as a constant, and does not trace how it is found.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _available(device: torch.device) -> str | None:
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


def only_on_request(device: torch.device) -> str | None:
    if WANTED:
        return None
    return "its kernels are proven in an emulator, not yet on a GPU: backend='cuda' or FASTATTN_CUDA=1 asks for them"


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; of an emulated one that of Hopper."""
    return _HOPPER if device.type == "cpu" else torch.cuda.get_device_capability(device)


capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def module(device: torch.device) -> ModuleType:
    """The kernels' launchers."""
    return native.load_emulator() if device.type == "cpu" else native.load(capability(device))


@functools.cache
def _has_attention(device: torch.device) -> bool:
    """A module may have been compiled for sm_90, whose instructions are not all of Hopper's."""
    return device.type == "cpu" or hasattr(module(device), "attention_forward")


_has_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(spec: Spec, device: torch.device) -> str | None:
    if isinstance(spec, AttentionSpec):
        return _unsupported_attention(spec, device)
    if not isinstance(spec, NormSpec | SoftmaxSpec | CrossEntropySpec):
        return f"it has no kernel for {spec.op}"
    if spec.dtype not in _ROW_DTYPES:
        return f"dtype {_name(spec.dtype)} (it has float16, bfloat16 and float32)"
    if isinstance(spec, NormSpec):
        return _unsupported_norm(spec)
    if isinstance(spec, CrossEntropySpec):
        return _unsupported_cross_entropy(spec)
    return None if spec.dim == -1 else "softmax over another dimension than the last"


def _unsupported_attention(spec: AttentionSpec, device: torch.device) -> str | None:
    if capability(device) != _HOPPER:
        return "its attention is for Hopper (compute capability 9.0), this GPU has {}.{}".format(*capability(device))
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {_name(spec.dtype)} (its attention has float16 and bfloat16)"
    if not _has_attention(device):
        return "it was compiled for sm_90, and its attention is for sm_90a: `python -m fastattn build --arch sm_90a`"
    if (spec.D, spec.D_v) not in HEAD_DIMS:
        return f"head dimensions {spec.D} of q and k, {spec.D_v} of v (it has 64, 96, 128, 192, 256, and 192 with 128)"
    for name in ("bias", "mask", "alibi", "sinks"):
        if getattr(spec, name):
            return f"{'alibi_slopes' if name == 'alibi' else name} (its attention has causal, window, softcap, varlen)"
    return "dropout (its attention has causal, window, softcap, varlen)" if spec.dropout_p else None


def _unsupported_norm(spec: NormSpec) -> str | None:
    if spec.dropout_p:
        return "dropout (its norms have a residual without)"
    if spec.memory_efficient:
        return "memory_efficient (its norms keep x or h)"
    named = {"weight": spec.weight_dtype, "bias": spec.bias_dtype, "residual": spec.residual_dtype}
    for name, dtype in {**named, "the result": spec.out_dtype}.items():
        if dtype not in (None, spec.dtype, torch.float32):
            return f"{name} of dtype {_name(dtype)} with x of {_name(spec.dtype)} (it has that of x, and float32)"
    return None


def _unsupported_cross_entropy(spec: CrossEntropySpec) -> str | None:
    if spec.target_dtype not in (torch.int64, torch.int32):
        return f"target of dtype {_name(spec.target_dtype)} (it has classes, in int32 and int64)"
    if spec.weight_dtype is not None and spec.label_smoothing:
        return "weight together with label_smoothing"
    for name, dtype in (("weight", spec.weight_dtype), ("the loss", spec.loss_dtype)):
        if dtype not in (None, spec.dtype, torch.float32):
            return f"{name} of dtype {_name(dtype)} (it has that of the logits, and float32)"
    return f"a gradient of {spec.differentiates} (its kernels have that of the logits)" if spec.differentiates else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(spec: Spec, device: torch.device) -> str:
    how = "emulated" if device.type == "cpu" else "compiled"
    if isinstance(spec, AttentionSpec):
        few, many = (module(device).attention_forward_config(spec.D, spec.D_v, S_q) for S_q in (1, 2**20))
        return f"{how}; forward {many}" + (f", for few queries {few}" if few != many else "")
    if isinstance(spec, CrossEntropySpec):
        return f"{how}; one kernel, forward with the gradient, a row in registers or shared memory"
    return f"{how}; one kernel forward, one backward, a row in registers or shared memory"


def attention_forward(o: Tensor, lse: Tensor, x: AttentionInputs, spec: AttentionSpec) -> None:
    from fastattn.backends.cuda.attention import launch_forward

    with torch.cuda.device_of(o):
        launch_forward(module(o.device), o, lse, x, spec)


def norm_forward(
    y: Tensor,
    h: Tensor,
    stats: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    spec: NormSpec,
) -> None:
    from fastattn.backends.cuda import rows

    weight, bias = (t if t is None else t.contiguous().view(-1) for t in (weight, bias))
    with torch.cuda.device_of(x):
        rows.norm_forward(module(x.device), y, h, stats, x, weight, bias, residual, spec)


def norm_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    dy: Tensor | None,
    dh: Tensor | None,
    base: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    spec: NormSpec,
) -> None:
    from fastattn.backends.cuda import rows

    dweight, dbias, weight = (t if t is None else t.contiguous().view(-1) for t in (dweight, dbias, weight))
    if dy is None:  # nothing flows back through y, and 0 · inf would be NaN
        for t in (dweight, dbias):
            if t is not None:
                t.zero_()
        for t in (dx, dresidual):
            if t is not None:
                t.zero_() if dh is None else t.copy_(dh)
        return
    with torch.cuda.device_of(base):
        rows.norm_backward(module(base.device), dx, dweight, dbias, dresidual, dy, dh, base, weight, stats, spec)


def softmax_forward(y: Tensor, x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    from fastattn.backends.cuda import rows

    with torch.cuda.device_of(x):
        rows.softmax_forward(module(x.device), y, x, mask, spec)


def softmax_backward(dx: Tensor | None, dy: Tensor | None, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    from fastattn.backends.cuda import rows

    if dx is None:
        return
    if dy is None:
        dx.zero_()
        return
    with torch.cuda.device_of(y):
        rows.softmax_backward(module(y.device), dx, dy, y, mask, spec)


def cross_entropy_forward(
    loss: Tensor,
    row_max: Tensor | None,
    log_sum: Tensor | None,
    divisor: Tensor | None,
    dlogits: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: CrossEntropySpec,
) -> None:
    from fastattn.backends.cuda import rows

    weight = weight if weight is None else weight.contiguous()
    with torch.cuda.device_of(logits):
        rows.cross_entropy_forward(
            module(logits.device), loss, row_max, log_sum, divisor, dlogits, logits, target, weight, spec
        )


def cross_entropy_backward(
    dlogits: Tensor,
    dloss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    divisor: Tensor | None,
    spec: CrossEntropySpec,
) -> None:
    from fastattn.backends.cuda import rows

    weight = weight if weight is None else weight.contiguous()
    if dloss is None:
        dlogits.zero_()
        return
    with torch.cuda.device_of(logits):
        rows.cross_entropy_backward(
            module(logits.device), dlogits, dloss, logits, target, weight, row_max, log_sum, divisor, spec
        )


def cross_entropy_scale(out: Tensor, factor: Tensor | None, dlogits: Tensor) -> None:
    from fastattn.backends.cuda import rows

    if factor is None:
        out.zero_()
        return
    with torch.cuda.device_of(out):
        rows.cross_entropy_scale(module(out.device), out, factor, dlogits)

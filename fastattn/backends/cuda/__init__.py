"""Hand-written CUDA kernels (csrc/cuda), compiled for the GPU at hand by `python -m fastattn build`.

FASTATTN_EMULATE=1 runs the same kernel sources on CPU tensors, in the emulator of csrc/emulator: slowly, for tests.
"""

from __future__ import annotations

import os

import torch

from fastattn.backends.cuda import attention, module, rows
from fastattn.spec import AttentionSpec, CrossEntropySpec, NormSpec, SoftmaxSpec, Spec, Work

NAME = "cuda"
COMPOSITE = False

WANTED = os.environ.get("FASTATTN_CUDA", "0") == "1"
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))  # of q and k, and of v
_ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

attention_forward = attention.attention_forward
norm_forward, norm_backward = rows.norm_forward, rows.norm_backward
softmax_forward, softmax_backward = rows.softmax_forward, rows.softmax_backward
cross_entropy_forward, cross_entropy_backward = rows.cross_entropy_forward, rows.cross_entropy_backward
cross_entropy_scale = rows.cross_entropy_scale


def available(device: torch.device) -> str | None:
    return module.why_not(device)


def only_on_request(spec: Spec, device: torch.device, work: Work | None) -> str | None:
    if WANTED:
        return None
    return "its kernels are proven in an emulator, not yet on a GPU: backend='cuda' or FASTATTN_CUDA=1 asks for them"


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
    if module.capability(device) != module.HOPPER:
        return "its attention is for Hopper (compute capability 9.0), this GPU has {}.{}".format(
            *module.capability(device)
        )
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {_name(spec.dtype)} (its attention has float16 and bfloat16)"
    if not module.has_attention(device):
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
        few, many = (module.load(device).attention_forward_config(spec.D, spec.D_v, S_q) for S_q in (1, 2**20))
        return f"{how}; forward {many}" + (f", for few queries {few}" if few != many else "")
    if isinstance(spec, CrossEntropySpec):
        return f"{how}; one kernel, forward with the gradient, a row in registers or shared memory"
    return f"{how}; one kernel forward, one backward, a row in registers or shared memory"

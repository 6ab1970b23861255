"""The variants of the attention kernels that the ahead-of-time report compiles: what the launchers would, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn.backends.triton.attention_bwd import attention_backward_dkdv_kernel, attention_backward_dq_kernel
from fastattn.backends.triton.attention_fwd import attention_forward_kernel
from fastattn.backends.triton.blocks.features import Features
from fastattn.backends.triton.configs import TileConfig, backward_config, forward_config
from fastattn.backends.triton.inspection import KernelCase

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_POINTERS = {"LSE": "fp32", "DELTA": "fp32", "DLSE": "fp32", "SEED": "i64"}  # all others have the inputs' dtype
_FLOATS = ("scale", "dropout_scale")


@dataclass(frozen=True)
class Variant:
    """One call, as far as it decides what is compiled."""

    name: str
    D: int
    D_v: int = 0  # 0: as D
    dtype: torch.dtype = torch.bfloat16
    G: int = 1
    features: Features = Features()
    budget: str = "no_spills"


def _variants() -> list[Variant]:
    causal, window = Features(RIGHT=True), Features(LEFT=True, RIGHT=True)
    dropout = Features(RIGHT=True, DROPOUT=True)
    common = [
        Variant(f"{name}/D{D}", D, G=G, features=features)
        for D in (64, 128)
        for name, G, features in (
            ("full", 1, Features()),
            ("causal", 1, causal),
            ("window", 1, window),
            ("gqa", 4, causal),
            ("dropout", 1, dropout),
        )
    ]
    return [
        *common,
        Variant("causal/D96", 96, features=causal),
        Variant("causal/D128/fp16", 128, dtype=torch.float16, features=causal),
        Variant("causal/D64/fp32", 64, dtype=torch.float32, features=causal, budget="listed"),
        Variant("causal/D256", 256, features=causal, budget="listed"),
        Variant("causal/D192x128", 192, 128, features=causal, budget="listed"),
    ]


def _case(prefix: str, kernel, variant: Variant, cfg: TileConfig) -> KernelCase:
    """Every stride is a multiple of 16 but the innermost, which is 1."""
    D_v = variant.D_v or variant.D
    constexprs: dict[str, object] = {
        "G": variant.G,
        "D": variant.D,
        "D_V": D_v,
        "F": variant.features,
        "DOT": "ieee",
        **{name: value for name, value in cfg.launch_options(variant.D, D_v).items() if name.isupper()},
        "DLSE": None,
    }
    if not variant.features.DROPOUT:
        constexprs["SEED"] = None
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name.startswith("stride_") and name.endswith("d"):
            constexprs[name] = 1
        elif name in constexprs:
            continue
        elif name.isupper() and name != "H":
            signature[name] = f"*{_POINTERS.get(name, _TYPES[variant.dtype])}"
            aligned.append(name)
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_"):
                aligned.append(name)
    return KernelCase(
        name=f"{prefix}/{variant.name}",
        kernel=kernel,
        signature=signature,
        constexprs={name: value for name, value in constexprs.items() if name in kernel.arg_names},
        num_warps=cfg.num_warps,
        num_stages=cfg.num_stages,
        divisible_by_16=tuple(aligned),
        budget=variant.budget,
    )


def forward_cases(arch: str) -> list[KernelCase]:
    return [
        _case("attention_fwd", attention_forward_kernel, v, forward_config(arch, v.D, v.D_v or v.D, v.dtype))
        for v in _variants()
    ]


def backward_cases(arch: str) -> list[KernelCase]:
    cases = []
    for v in _variants():
        cfg = backward_config(arch, v.D, v.D_v or v.D, v.dtype)
        cases.append(_case("attention_bwd_dq", attention_backward_dq_kernel, v, cfg.dq))
        cases.append(_case("attention_bwd_dkdv", attention_backward_dkdv_kernel, v, cfg.dkdv))
    return cases

"""The variants of the attention kernels that the ahead-of-time report compiles: what the launchers would, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastattn.backends.triton.attention_bwd import attention_backward_dkdv_kernel, attention_backward_dq_kernel
from fastattn.backends.triton.attention_bwd_bias import attention_backward_dbias_kernel
from fastattn.backends.triton.attention_fwd import attention_forward_kernel
from fastattn.backends.triton.attention_jvp import attention_jvp_kernel
from fastattn.backends.triton.blocks.features import Features
from fastattn.backends.triton.configs import (
    Columns,
    TileConfig,
    backward_config,
    forward_config,
    jvp_config,
    widest_head,
)
from fastattn.backends.triton.inspection import KernelCase
from fastattn.backends.triton.mask_tiles import mask_tiles_kernel

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}
_POINTERS = {  # those whose type is not that of q, k and v
    **dict.fromkeys(("LSE", "LSE_LOW", "DELTA", "SLOPES", "SINKS", "QK_SCALES", "V_SCALES"), "fp32"),
    **dict.fromkeys(("DLSE", "DSLOPES", "DSINKS", "TLSE", "TSLOPES", "TSINKS"), "fp32"),
    **dict.fromkeys(("CU_SEQLENS_Q", "CU_SEQLENS_K", "TILES"), "i32"),
    "MASK": "u8",
    "SEED": "i64",
}
_OF_FEATURE = {  # pointers that are None while the feature is off
    "BIAS": ("BIAS", "TBIAS"),
    "MASK": ("MASK", "TILES"),
    "ALIBI": ("SLOPES", "DSLOPES", "TSLOPES"),
    "SINKS": ("SINKS", "DSINKS", "TSINKS"),
    "DROPOUT": ("SEED",),
    "FP8": ("QK_SCALES", "V_SCALES"),
    "VARLEN": ("CU_SEQLENS_Q", "CU_SEQLENS_K"),
}
_FLOATS = ("scale", "softcap", "dropout_scale")
_SIZES = ("B", "H", "H_kv", "S_q", "S_k")


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


def _features(**flags: bool) -> Features:
    """Causal, unless said otherwise, and scaled in the score function where the launcher would do it there."""
    added = any(flags.get(name) for name in ("BIAS", "ALIBI", "SOFTCAP"))
    return Features(**{"RIGHT": True, "PRESCALED": added, **flags})


_EVERYTHING = _features(
    LEFT=True, SOFTCAP=True, BIAS=True, ALIBI=True, MASK=True, SINKS=True, DROPOUT=True, VARLEN=True
)
_SETS = {  # name -> (G, features, budget)
    "full": (1, Features(), "no_spills"),
    "causal": (1, _features(), "no_spills"),
    "window": (1, _features(LEFT=True), "no_spills"),
    "gqa": (4, _features(), "no_spills"),
    "varlen": (1, _features(VARLEN=True), "no_spills"),
    "softcap": (1, _features(SOFTCAP=True), "no_spills"),
    "sinks": (1, _features(SINKS=True), "no_spills"),
    "bias": (1, _features(BIAS=True, RIGHT=False), "no_spills"),
    "dropout": (1, _features(DROPOUT=True), "no_spills"),
    "alibi": (1, _features(ALIBI=True), "listed"),
    "mask": (1, _features(MASK=True, RIGHT=False), "listed"),
    "everything": (4, _EVERYTHING, "listed"),
}


def _variants(arch: str) -> list[Variant]:
    """Those for which the architecture has tiles."""
    causal = _features()
    common = [
        Variant(f"{name}/D{D}", D, G=G, features=features, budget=budget)
        for D in (64, 128)
        for name, (G, features, budget) in _SETS.items()
    ]
    widths = [
        Variant("causal/D96", 96, features=causal),
        Variant("causal/D128/fp16", 128, dtype=torch.float16, features=causal),
        Variant("causal/D64/fp32", 64, dtype=torch.float32, features=causal, budget="listed"),
        Variant("causal/D256", 256, features=causal, budget="listed"),
        Variant("causal/D192x128", 192, 128, features=causal, budget="listed"),
        Variant("causal/D512", 512, features=causal, budget="listed"),
        Variant("causal/D576x512", 576, 512, features=causal, budget="listed"),
    ]
    return [v for v in (*common, *widths) if max(v.D, v.D_v) <= widest_head(arch, v.dtype)]


def _case(prefix: str, kernel, variant: Variant, cfg: TileConfig, **more: object) -> KernelCase:
    """Every stride is a multiple of 16 but the innermost, which is 1."""
    constexprs: dict[str, object] = {
        "G": variant.G,
        "D": Columns.of(variant.D, variant.dtype.itemsize),
        "D_V": Columns.of(variant.D_v or variant.D, variant.dtype.itemsize),
        "F": variant.features,
        "DOT": "ieee",
        "BLOCK_M": cfg.BLOCK_M,
        "BLOCK_N": cfg.BLOCK_N,
        "DLSE": None,
        **more,
    }
    for feature, pointers in _OF_FEATURE.items():
        if not getattr(variant.features, feature):
            constexprs.update(dict.fromkeys(pointers))
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name.startswith("stride_") and name.endswith(("d", "_n")):
            constexprs[name] = 1
        elif name in constexprs:
            continue
        elif name.isupper() and name not in _SIZES:
            own = torch.bfloat16 if name == "O" and variant.features.FP8 else variant.dtype
            signature[name] = f"*{_POINTERS.get(name, _TYPES[own])}"
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
        small_tiles=max(cfg.BLOCK_M, cfg.BLOCK_N) < 64,  # very wide heads have room for no others
    )


def forward_cases(arch: str) -> list[KernelCase]:
    fp8 = _features(FP8=True, PRESCALED=True)
    forward_only = [
        Variant(f"fp8/D{D}", D, dtype=torch.float8_e4m3fn, features=fp8, budget="listed")
        for D in (64, 128)
        if arch in ("sm_90", "sm_100")
    ]
    return [
        *_mask_tiles_cases(arch),
        *(
            _case("attention_fwd", attention_forward_kernel, v, forward_config(arch, v.D, v.D_v or v.D, v.dtype))
            for v in (*_variants(arch), *forward_only)
        ),
    ]


def _mask_tiles_cases(arch: str) -> list[KernelCase]:
    """The lists that a bool mask is turned into first, with the tiles of D 128."""
    cfg = forward_config(arch, 128, 128, torch.bfloat16)
    cfg = replace(cfg, num_warps=4, num_stages=3)  # as launched, without a choice of its own
    window = Features(LEFT=True, RIGHT=True, MASK=True)
    variants = [
        Variant("by_query/D128", 128, features=Features(MASK=True)),
        Variant("by_key/D128", 128, features=Features(MASK=True)),
        Variant("by_key/varlen_window/D128", 128, features=replace(window, VARLEN=True)),
    ]
    return [_case("mask_tiles", mask_tiles_kernel, v, cfg, BY_KEY=v.name.startswith("by_key")) for v in variants]


# On sm_80 lse_low takes four registers too many in these. A tile of 32 queries has them free; no card has timed either.
_FOUR_SHORT = ("softcap/D128", "dropout/D128")


def backward_cases(arch: str) -> list[KernelCase]:
    cases = []
    for v in _variants(arch):
        cfg = backward_config(arch, v.D, v.D_v or v.D, v.dtype)
        cases.append(_case("attention_bwd_dq", attention_backward_dq_kernel, v, cfg.dq))
        by_key = replace(v, budget="listed") if arch == "sm_80" and v.name in _FOUR_SHORT else v
        cases.append(_case("attention_bwd_dkdv", attention_backward_dkdv_kernel, by_key, cfg.dkdv))
        if v.features.BIAS:
            for over, REDUCE_M, REDUCE_N in (("", False, False), ("_rows", True, False), ("_both", True, True)):
                if not over or v.name == "bias/D64":  # what the bias is broadcast over hardly matters: once is enough
                    reduced = {"REDUCE_M": REDUCE_M, "REDUCE_N": REDUCE_N}
                    cases.append(
                        _case(f"attention_bwd_dbias{over}", attention_backward_dbias_kernel, v, cfg.dbias, **reduced)
                    )
    return cases


def jvp_cases(arch: str) -> list[KernelCase]:
    """With the tangents of all inputs; fewer variants than of the gradients, since it is the same blocks again."""
    names = ("causal", "window", "bias", "dropout", "everything")
    cases = []
    for v in _variants(arch):
        if v.name.startswith(names) and max(v.D, v.D_v) <= 256:
            cfg = jvp_config(arch, v.D, v.D_v or v.D, v.dtype)
            given = Features(BIAS=v.features.BIAS, ALIBI=v.features.ALIBI)
            cases.append(_case("attention_jvp", attention_jvp_kernel, v, cfg, F_T=given))
    return cases

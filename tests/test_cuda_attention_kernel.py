"""The attention kernel of sm_90a, compiled for this CPU with the emulator of csrc/emulator.

Its o and lse are held to float64 in all four schedules, and mistakes are planted in it, each of which must be noticed.
"""

from __future__ import annotations

import math
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import BF16, F16, Case, case
from parity import Packed, inputs_of, packed_of, spec_of
from torch import Tensor

from fastattn import native
from fastattn.reference.attention import attention as reference
from fastattn.testing import assert_close, make_inputs, simulate_rounding

pytestmark = pytest.mark.skipif(native.why_no_emulator() is not None, reason="the emulator needs a C++ compiler")

SCHEDULES = ("eager", "tma_last", "wgmma_last", "random")
CPU = torch.device("cpu")
FAR = 2**62
UNTOUCHED = 7.0  # what o holds where no kernel may write


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    return native.load_emulator()


@pytest.fixture
def two_sms(kernels):
    kernels.emulator_sms(2)
    yield
    kernels.emulator_sms(4)


def launch(run: Any, q: Tensor, k: Tensor, v: Tensor, spec: Any, packed: Packed | None = None) -> tuple[Tensor, ...]:
    """-> (o, lse, lse_low) of q (B, H, S_q, D), k (B, H_kv, S_k, D), v (B, H_kv, S_k, D_v)."""
    B, H, S_q, D = q.shape
    H_kv, S_k, D_v = v.shape[1:]
    room = torch.full((B, H, S_q + 3, D_v + 8), UNTOUCHED, dtype=q.dtype)
    o = room[:, :, :S_q, :D_v].fill_(math.nan)
    lse, lse_low = torch.full((2, B, H, S_q), math.nan)
    counter = torch.zeros(2, dtype=torch.int32)
    cu = (packed.cu_seqlens_q, packed.cu_seqlens_k) if packed else (None, None)
    run(
        **{name: t.data_ptr() for name, t in zip("qkvo", (q, k, v, o), strict=True)},
        **{f"{name}_strides": t.stride()[:3] for name, t in zip("qkvo", (q, k, v, o), strict=True)},
        B=B if cu[0] is None else len(cu[0]) - 1,
        H=H,
        H_kv=H_kv,
        S_q=S_q,
        S_k=S_k,
        D=D,
        D_v=D_v,
        dtype={BF16: "bf16", F16: "fp16"}[q.dtype],
        lse=lse.data_ptr(),
        lse_low=lse_low.data_ptr(),
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
        left=FAR if spec.left is None else spec.left,
        right=FAR if spec.right is None else spec.right,
        bottom_right=not spec.top_left,
        cu_seqlens_q=0 if cu[0] is None else cu[0].data_ptr(),
        cu_seqlens_k=0 if cu[1] is None else cu[1].data_ptr(),
        counter=counter.data_ptr(),
    )
    assert counter.tolist() == [0, 0], "the kernel leaves its counter as it found it"
    assert (room[:, :, S_q:] == UNTOUCHED).all(), "the kernel wrote rows after the last"
    assert (room[..., D_v:] == UNTOUCHED).all(), "the kernel wrote columns after the last"
    return o, lse, lse_low


def expected(q: Tensor, k: Tensor, v: Tensor, spec: Any, packed: Packed | None) -> list[tuple[Tensor, Tensor]]:
    """Return (o, lse) in float64, and draws of them in the dtype of q."""
    function = packed.reference if packed else reference
    exact = function(*(t.double() for t in (q, k, v)), spec, compute_dtype=torch.float64)
    o, lse = simulate_rounding(lambda: function(q, k, v, spec, compute_dtype=q.dtype))
    return [exact, (o, lse.float())]


def check(kernels: ModuleType, run: Any, x: Case, schedules: tuple[str, ...] = SCHEDULES, seed: int = 1) -> None:
    q, k, v = inputs_of(x, CPU)[0]
    packed, spec = packed_of(x, CPU), spec_of(q, k, v, **x.options)
    exact, rounded = expected(q, k, v, spec, packed)
    for schedule in schedules:
        kernels.emulator_mode(schedule, seed)
        o, lse, _ = launch(run, q, k, v, spec, packed)
        assert_close(o, exact[0], rounded[0], f"o ({schedule})")
        assert_close(lse, exact[1], rounded[1], f"lse ({schedule})")


DTYPES = {BF16: "bf16", F16: "fp16"}
WIDTHS = [
    *(case(f"full_{D}_{DTYPES[t]}", 65, 150, H=1, D=D, dtype=t) for D in (64, 96, 128, 192, 256) for t in DTYPES),
    *(case(f"causal_{D}", 140, 130, H=1, D=D, dtype=BF16, causal="bottom_right") for D in (64, 96, 128, 192, 256)),
    case("value_narrower", 65, 120, H=1, D=192, D_v=128, dtype=BF16, causal="bottom_right"),
    case("value_narrower_fp16", 65, 120, H=1, D=192, D_v=128, dtype=F16),
    case("cluster_of_3_blocks", 260, 140, H=1, D=128, dtype=BF16),
    case("batch_of_clusters", 130, 140, B=2, H=2, H_kv=1, D=128, dtype=BF16),
]
LENGTHS = [
    case("one_query_one_key", 1, 1, D=64, dtype=BF16),
    case("one_key", 70, 1, D=64, dtype=BF16),
    case("no_queries", 0, 5, D=64, dtype=BF16),
    case("no_keys", 5, 0, D=64, dtype=BF16),
    case("no_keys_and_o_beside_q", 5, 0, D=256, dtype=BF16),
    case("no_batch", 5, 5, B=0, D=64, dtype=BF16),
    case("exact_tiles", 192, 128, H=1, D=64, dtype=BF16),
    case("one_more_than_tiles", 193, 129, H=1, D=64, dtype=BF16),
    case("many_keys", 33, 900, H=1, D=64, dtype=F16),
    case("batch", 20, 37, B=3, H=3, D=64, dtype=F16),
]
MASKS = [
    case("top_left_more_keys", 150, 330, H=1, D=64, dtype=BF16, causal="top_left"),
    case("top_left_more_queries", 330, 150, H=1, D=64, dtype=BF16, causal="top_left"),
    case("bottom_right_more_keys", 150, 330, H=1, D=64, dtype=BF16, causal="bottom_right"),
    case("bottom_right_more_queries", 330, 150, H=1, D=64, dtype=BF16, causal="bottom_right"),
    case("causal_decode", 1, 200, D=64, dtype=BF16, causal="bottom_right"),
    case("window_both", 330, 330, H=1, D=64, dtype=BF16, window=(100, 60)),
    case("window_left", 200, 330, H=1, D=64, dtype=F16, window=(40, None)),
    case("window_right", 200, 330, H=1, D=64, dtype=BF16, window=(None, 9)),
    case("window_one_key", 200, 200, H=1, D=64, dtype=BF16, window=(0, 0)),
    case("window_of_whole_blocks", 200, 600, H=1, D=64, dtype=BF16, window=(390, 0)),
    case("window_wider_than_everything", 60, 60, D=64, dtype=BF16, window=(2**40, 2**40)),
    case("rows_that_see_nothing_first", 300, 60, H=1, D=64, dtype=BF16, window=(4, 0)),
    case("rows_that_see_nothing_last", 300, 60, H=1, D=64, dtype=BF16, window=(4, None), causal="top_left"),
]
HEADS = [
    case("gqa", 100, 150, B=2, H=4, H_kv=2, D=64, dtype=BF16, causal="bottom_right"),
    case("gqa_of_8_in_a_tile", 5, 200, H=8, H_kv=1, D=64, dtype=BF16, causal="bottom_right"),
    case("gqa_of_6_in_pairs", 7, 200, H=12, H_kv=2, D=64, dtype=F16, window=(30, 0)),
    case("gqa_of_3", 40, 200, H=3, H_kv=1, D=64, dtype=BF16, causal="bottom_right"),
    case("gqa_packed_varlen", 20, 50, H=4, H_kv=1, D=64, dtype=BF16, lengths=((20, 50), (3, 9)), causal="bottom_right"),
]
SCORES = [
    case("softcap", 70, 150, D=64, dtype=BF16, softcap=2.5),
    case("softcap_50_causal_fp16", 140, 140, H=1, D=128, dtype=F16, softcap=50.0, causal=True),
    case("softcap_negative_scale", 70, 150, D=64, dtype=BF16, softcap=0.7, scale=-1.0),
    case("scale_negative", 70, 150, D=64, dtype=BF16, scale=-0.5, causal="bottom_right"),
    case("scale_0", 70, 150, D=64, dtype=BF16, scale=0.0, causal="bottom_right"),
    case("scale_1", 70, 150, D=64, dtype=BF16, scale=1.0),
]
SEQUENCES = ((70, 130), (5, 0), (0, 7), (64, 64), (33, 1), (17, 100))
VARLEN = [
    case("varlen", 70, 130, D=64, dtype=BF16, lengths=SEQUENCES),
    case(
        "varlen_causal_gqa",
        70,
        130,
        H=4,
        H_kv=2,
        D=64,
        dtype=F16,
        lengths=SEQUENCES,
        causal="bottom_right",
        left_over=9,
    ),
    case("varlen_window", 70, 130, H=1, D=128, dtype=BF16, lengths=SEQUENCES, window=(30, 3), causal="top_left"),
    case("varlen_o_beside_q", 70, 130, H=1, D=256, dtype=BF16, lengths=SEQUENCES, left_over=140),
]
LAYOUTS = [
    case(f"layout_{layout}", 70, 90, B=2, H=4, H_kv=2, D=64, dtype=BF16, layout=layout)
    for layout in ("heads_inside", "packed")
]
CASES = [*WIDTHS, *LENGTHS, *MASKS, *HEADS, *SCORES, *VARLEN, *LAYOUTS]


@pytest.mark.parametrize("x", CASES, ids=str)
def test_against_float64(kernels, x):
    check(kernels, kernels.attention_forward, x)


@pytest.mark.parametrize("sms", [1, 2, 7])
def test_persistent_ctas_take_tiles_in_turn(kernels, two_sms, sms):
    """More tiles than CTAs, dealt out in turn, claimed from the counter, and by clusters; fewer tiles than CTAs."""
    kernels.emulator_sms(sms)
    check(kernels, kernels.attention_forward, case("", 200, 70, B=2, H=3, D=64, dtype=BF16), ("random",))
    check(kernels, kernels.attention_forward, case("", 400, 400, H=3, D=64, dtype=BF16, causal=True), ("random",))
    check(kernels, kernels.attention_forward, case("", 300, 70, H=2, D=128, dtype=BF16), ("random",))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("size", [2.0**6, 2.0**11, 2.0**13])
def test_large_scores(kernels, size, dtype):
    """Scores near size² / 8, in fp32 exact: whole numbers times 1/8, of which all keys share the large part."""
    q, k, v = make_inputs((1, 2, 70, 64), (1, 2, 150, 64), (1, 2, 150, 64), dtype=dtype)
    q, k = q.round(), k.round()
    q[..., 0] = k[..., 0] = size
    if size * size > 2.0**23:  # the sum would round: nothing but the large part, which the last key has twice
        q[..., 1:] = 0.0
        k[..., -1, 0] *= 2.0
    spec = spec_of(q, k, v)
    scores = q.double() @ k.double().mT / 8
    exact, lse_exact = scores.softmax(-1) @ v.double(), scores.logsumexp(-1)
    rounded = simulate_rounding(lambda: scores.float().softmax(-1).to(dtype) @ v)
    kernels.emulator_mode("random", 1)
    o, lse, lse_low = launch(kernels.attention_forward, q, k, v, spec)
    assert_close(o, exact, rounded, "o")
    one_rounding = torch.finfo(torch.float32).eps * math.log(k.shape[2])  # of log Σ, the part that is not exact
    assert (lse.double() + lse_low - lse_exact).abs().max() <= one_rounding


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_a_masked_key_never_leaks(kernels, tensor, hidden):
    """The last key is seen by the last row alone; every other row is what it would be without it."""
    q, k, v = make_inputs((1, 2, 150, 64), (1, 2, 150, 64), (1, 2, 150, 64), dtype=BF16)
    spec = spec_of(q, k, v, causal=True)
    exact, rounded = expected(q, k, v, spec, None)
    {"k": k, "v": v}[tensor][..., -1, 5] = hidden
    for schedule in SCHEDULES:
        kernels.emulator_mode(schedule, 1)
        o, lse, _ = launch(kernels.attention_forward, q, k, v, spec)
        assert_close(
            o[:, :, :-1], exact[0][:, :, :-1], rounded[0][..., :-1, :], f"o of rows that do not see it ({schedule})"
        )
        assert_close(lse[:, :, :-1], exact[1][:, :, :-1], rounded[1][..., :-1], f"lse of them ({schedule})")
        last = o[:, :, -1]
        if tensor == "v":
            assert_close(lse, exact[1], rounded[1], f"lse ({schedule})")
            torch.testing.assert_close(last[..., 5].double(), torch.full((1, 2), hidden).double(), equal_nan=True)
            seen = torch.arange(64) != 5
            assert_close(last[..., seen], exact[0][:, :, -1][..., seen], rounded[0][..., -1, seen], "other columns")
        elif math.isnan(hidden):
            assert last.isnan().all()
            assert lse[:, :, -1].isnan().all()


@pytest.mark.parametrize("D", [64, 256])
def test_what_lies_between_packed_sequences_never_leaks(kernels, D):
    """Each sequence is followed by one whose k and v are NaN, in the same tiles."""
    x = case(
        "", 40, 40, H=2, H_kv=1, D=D, dtype=BF16, lengths=((40, 40), (9, 9), (30, 50), (9, 9)), causal="bottom_right"
    )
    (q, k, v), packed = inputs_of(x, CPU)[0], packed_of(x, CPU)
    for t in (k, v):
        t[:, :, 40:49] = t[:, :, 99:] = math.nan
    q[:, :, 40:49] = q[:, :, 79:] = math.nan
    spec = spec_of(q, k, v, **x.options)
    exact, rounded = expected(q, k, v, spec, packed)
    sound = torch.cat([torch.arange(40), torch.arange(49, 79)])
    assert exact[0][:, :, sound].isfinite().all()
    for schedule in SCHEDULES:
        kernels.emulator_mode(schedule, 1)
        o, lse, _ = launch(kernels.attention_forward, q, k, v, spec, packed)
        assert_close(o, exact[0], rounded[0], f"o ({schedule})")
        assert_close(lse, exact[1], rounded[1], f"lse ({schedule})")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"D": 80, "D_v": 80}, "`q` and `v` are 80 and 80 wide; accepted are 64, 96, 128, 192 and 256"),
        ({"dtype": "fp32"}, "`dtype` is 'fp32'; it must be 'bf16' or 'fp16'"),
        (
            {"q_strides": (4096, 4096, 68)},
            "`q` has a stride of 68 elements; all but the last are positive multiples of 16",
        ),
        ({"k": 8 + 2**20}, "`k` begins at an address that is no multiple of 16 bytes"),
        ({"right": 0, "counter": 0}, "`counter` is missing"),
    ],
)
def test_what_it_refuses(kernels, options, message):
    q = torch.zeros(1, 1, 64, 64, dtype=BF16)
    arguments = {name: q.data_ptr() for name in ("q", "k", "v", "o", "lse", "lse_low", "counter")}
    arguments |= {f"{name}_strides": (4096, 4096, 64) for name in "qkvo"}
    arguments |= {"B": 1, "H": 1, "H_kv": 1, "S_q": 64, "S_k": 64, "D": 64, "D_v": 64, "dtype": "bf16", "scale": 0.125}
    with pytest.raises(ValueError, match=message):
        kernels.attention_forward(**(arguments | options))


def test_every_config_says_what_it_is(kernels):
    for D, D_v in ((64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)):
        text = kernels.attention_forward_config(D, D_v)
        assert text.startswith(f"D {D}, D_v {D_v}, BLOCK_M ")
        assert int(text.split("shared bytes ")[1]) <= 227 * 1024
    assert kernels.attention_forward_config(80, 80) == ""


# Where a mistake shows: the config of csrc/emulator/attention_variants.cpp, and what it is asked for.
TILES = case("", 260, 200, D=64, dtype=BF16, causal="bottom_right")  # several tiles a CTA, several blocks a tile
VARIANTS = {
    "small": (TILES, case("", 140, 140, D=64, dtype=BF16)),
    "pair": (case("", 140, 200, D=64, dtype=BF16), TILES),
    "eager": (TILES, case("", 70, 90, D=64, dtype=BF16, lengths=((60, 90), (40, 80)))),
    "deep": (TILES, case("", 100, 300, H=1, D=64, dtype=BF16, softcap=5.0)),
    "long": (
        TILES,
        case("", 70, 90, D=64, dtype=BF16, lengths=((60, 90), (40, 80), (250, 250)), causal="bottom_right"),
        case("", 100, 150, H=8, H_kv=1, D=64, dtype=BF16, window=(60, 10)),
    ),
    "lone": (case("", 70, 360, D=128, dtype=BF16, causal="bottom_right"),),
}


@pytest.mark.parametrize("config", VARIANTS)
def test_other_configs(kernels, two_sms, config):
    """One of these uses each option of a config: stages, warpgroups, clusters, turns, laziness, polynomials."""
    assert set(VARIANTS) == set(kernels.emulator_attention_variants())
    kernels.emulator_attention(config)
    for x in VARIANTS[config]:
        check(kernels, kernels.attention_forward_variant, x)


@pytest.mark.slow
@pytest.mark.parametrize("config", VARIANTS)
def test_no_false_alarm(kernels, two_sms, config):
    kernels.emulator_attention(config)
    for seed in range(50):
        check(kernels, kernels.attention_forward_variant, VARIANTS[config][0], ("random",), seed)


class Unnoticed(Exception):
    pass


def notice(kernels: ModuleType, x: Case, bug: str) -> str:
    """The first schedule's complaint: the emulator's diagnosis, or what is wrong with the result."""
    q, k, v = inputs_of(x, CPU)[0]
    if bug == "LeakHidden":
        v[:, :, -1] = math.nan
    packed, spec = packed_of(x, CPU), spec_of(q, k, v, **x.options)
    exact, rounded = expected(q, k, v, spec, packed)
    for schedule in SCHEDULES:
        kernels.emulator_mode(schedule, 1)
        try:
            o, lse, _ = launch(kernels.attention_forward_variant, q, k, v, spec, packed)
            assert_close(o, exact[0], rounded[0], "o")
            assert_close(lse, exact[1], rounded[1], "lse")
        except (AssertionError, RuntimeError) as complaint:
            return str(complaint)
    raise Unnoticed(bug)


SEQUENCES_IN_A_TILE = case("", 40, 40, D=64, dtype=BF16, lengths=((40, 40), (30, 30)), causal="bottom_right")
BUGS = {  # what is said of it, of the variant "small" and TILES unless the next table says otherwise
    "NoInitSync": "mbarrier not initialised|mbarrier initialisation",
    "NoKeyFullWait": "wgmma_ss reads",
    "NoValueFullWait": "wgmma_rs reads",
    "NoKeyEmptyWait": "tma_load writes|too many arrivals",
    "NoValueEmptyWait": "tma_load writes|too many arrivals",
    "NoQueryEmptyWait": "tma_load writes|too many arrivals",
    "NoTileEmptyWait": "st_shared writes",
    "EarlyKeyRelease": "read by wgmma_ss",
    "EarlyValueRelease": "read by wgmma_rs",
    "NoScoreWait": "accumulator touched in flight",
    "EarlyRescale": "accumulator touched in flight",
    "EarlyPack": "A registers changed in flight",
    "NoWgmmaFence": "missing wgmma_fence",
    "ShortExpect": "deadlock",
    "WrongParity": "deadlock|wgmma_ss reads",
    "WrongKeyStride": "from float64",
    "WrongValueStride": "from float64|outside",
    "NoProxyFence": "missing proxy fence",
    "NoEpilogueBarrier": "tma_store reads",
    "NoStoreWait": "read by tma_store",
    "MaskOffByOne": "from float64",
    "NoRescale": "from float64",
    "LeakHidden": "o is inf from float64",
    "StoreBeyondSequence": "o is inf from float64|o is .* from float64",
    "CounterLeft": "leaves its counter",
    "ReleaseToSelf": "deadlock",
}
ELSEWHERE = {
    "WrongValueStride": ("lone", VARIANTS["lone"][0]),  # two panels of v
    "StoreBeyondSequence": ("small", SEQUENCES_IN_A_TILE),  # the first one last
    "ReleaseToSelf": ("pair", VARIANTS["pair"][0]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(kernels, two_sms, bug):
    assert {"None", *BUGS} == set(kernels.emulator_attention_bugs())
    config, x = ELSEWHERE.get(bug, ("small", TILES))
    kernels.emulator_attention(config, bug)
    if bug == "StoreBeyondSequence":
        kernels.emulator_sms(1)
    assert re.search(BUGS[bug], notice(kernels, x, bug))


@pytest.mark.parametrize(("config", "x"), [*ELSEWHERE.values(), ("small", TILES)])
def test_where_nothing_is_planted_nothing_is_noticed(kernels, two_sms, config, x):
    kernels.emulator_attention(config)
    with pytest.raises(Unnoticed):
        notice(kernels, x, "None")

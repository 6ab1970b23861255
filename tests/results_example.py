"""A run of the suite that nobody made: rows of every status, several families, peers ahead and behind."""

from __future__ import annotations

from benchmarks.results import Results, Row

PROVIDERS = {  # name -> how many times the time of the first
    "fastattn/triton": 1.0, "fastattn/eager": 2.5, "torch/cudnn": 0.9, "torch/flash": 1.6, "torch/flex": 1.3,
}  # fmt: skip


def row(family="attention", name="w", provider="fastattn/triton", seconds=1e-3, **fields) -> Row:
    given = {"direction": "forward", "dtype": "bfloat16", "series": "D128 causal", "size": 512, "status": "ok"} | fields
    if given["status"] != "ok":
        return Row(family, name, provider=provider, **given)
    spread = {"fastest_quarter": 0.98 * seconds, "slowest_quarter": 1.02 * seconds, "samples": 40, "timing": "events"}
    return Row(
        family, name, provider=provider, seconds=seconds, error=0.5, eager_error=0.6, peak_bytes=1 << 20,
        **(spread | given),
    )  # fmt: skip


def example() -> Results:
    rows = []
    for direction in ("forward", "backward"):
        for size in (512, 2048, 8192):
            work = {"flops": 7e10 * size / 512, "bytes": 1e8, "size": size, "direction": direction, "floor": 1e-4}
            for provider, factor in PROVIDERS.items():
                seconds = factor * 1e-4 * size / 512 * (1 if direction == "forward" else 2.5)
                rows.append(row(name=f"S{size} D128", provider=provider, seconds=seconds, **work))
            rows.append(
                row(name=f"S{size} D128", provider="flash_attn/2", status="unavailable", reason="no <module>", **work)
            )
            rows.append(
                row(name=f"S{size} D128", provider="xformers", status="failed", reason='"quoted" & <b>bold</b>', **work)
            )
    for N in (1024, 4096):
        norm = {"family": "layer_norm", "name": f"8192x{N}", "series": "layer_norm", "size": N, "bytes": 4.0 * 8192 * N}
        rows.append(row(seconds=2e-5 * N / 1024, floor=1e-5, **norm))
        rows.append(row(seconds=3e-5 * N / 1024, provider="torch/compile", floor=1e-5, **norm))
        rows.append(row(provider="quack", status="wrong", reason="the result is 9 roundings off", **norm))
        rows.append(row(provider="torch/cudnn", status="unsupported", reason="it has no layer_norm", **norm))
    machine = {
        "device": {"type": "cuda", "name": "Example <card>"},
        "threads": 8,
        "platform": "Linux",
        "versions": {"fastattn": "0", "torch": "2.13.0", "triton": "3.7.1", "python": "3.11.7", "cudnn": None},
    }
    ceilings = {"bytes_per_s": 4e12, "flops_per_s_bfloat16": 7e14}
    return Results(machine, ceilings, ["--quick", "--vs", "a<b"], "2026-01-02T03:04:05+00:00", rows)

"""`verify` passes here, and finds what is planted: a wrong result, a wrong gradient, a backend that breaks."""

from __future__ import annotations

import json

import pytest
import torch
from test_cli import run

import fastattn
from fastattn import backends
from fastattn.cli import main
from fastattn.cli.verify import examined
from fastattn.errors import UnsupportedError
from fastattn.verification import Check, checks, examine, prepare
from fastattn.verification.check import DTYPES, in_float64

CPU = torch.device("cpu")
HERE = ("--device", "cpu", "--backend", "eager")


def test_this_machine_passes_within_the_time_that_is_promised(tmp_path):
    done = run("verify", "--device", "cpu", "--json", str(tmp_path / "v.json"), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "v.json").read_text())
    assert {r["check"] for r in reports} == {check.name for check in checks()}
    names = {"cpu", "eager", "reference"} if backends.get("cpu").available(CPU) is None else {"eager", "reference"}
    assert {r["backend"] for r in reports} == names
    assert len(reports) == len(checks()) * len(DTYPES) * len(names)
    assert all(r["status"] == "ok" for r in reports)
    assert any(finding["error"] > 0 for r in reports for finding in r["findings"])
    assert "  triton: not available: Triton compiles for GPUs" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        f"{len(reports)} checks on {len(names)} backends, none further from float64 than twice torch's"
    )
    assert float(last.split("; ")[-1].removesuffix(" s")) < 20


@pytest.mark.parametrize("name", ["attention, causal", "swiglu"])
def test_interpreted_kernels_pass(name):
    done = run("verify", "--device", "cpu", "--backend", "triton", "--op", name, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if f"  {name} " in line]
    assert len(lines) == len(DTYPES)
    assert all(" triton " in line and line.endswith(" ok") for line in lines)


def planted(monkeypatch, function):
    """`function(y)` in the place of layer_norm's result."""
    ours = fastattn.layer_norm
    monkeypatch.setattr(fastattn, "layer_norm", lambda *a, **k: function(ours(*a, **k)))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.02 * dy


@pytest.mark.parametrize(
    ("function", "tensor"),
    [
        (lambda y: 1.0001 * y, "y"),
        (lambda y: y.half().float(), "y"),
        (lambda y: y[:-1], "y"),
        (lambda y: torch.cat((y[:-1], y[-1:] * torch.nan)), "y"),
        (WrongGradient.apply, "d"),
    ],
    ids=["scaled", "in half precision", "too short", "NaN", "gradient"],
)
def test_a_planted_error_is_found_and_named(monkeypatch, capsys, function, tensor):
    planted(monkeypatch, function)
    broken = tensor == "y" and function(torch.ones(2, 3)).shape != (2, 3)
    assert main(["verify", *HERE, "--op", "layer_norm, long", "--dtype", "float32"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  layer_norm, long rows")]
    assert "FAILED: " in line if broken else "   WRONG: at most " in line
    if not broken:
        assert line.split()[5].startswith(tensor)


def test_a_backend_that_breaks_is_told_and_the_rest_goes_on(monkeypatch, capsys):
    def breaks(y):
        raise RuntimeError("no such instruction")

    planted(monkeypatch, breaks)
    assert main(["verify", *HERE, "--op", "norm", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: RuntimeError: no such instruction") == 3
    assert out.count(" ok\n") == 2  # of rms_norm
    assert "5 checks on 1 backends, 0 wrong and 3 failed" in out


def test_a_refusal_is_counted_and_its_reason_told_on_request(monkeypatch, capsys):
    def refuses(y):
        raise UnsupportedError("layer_norm: not today.")

    planted(monkeypatch, refuses)
    arguments = ["verify", *HERE, "--op", "layer_norm, long", "--dtype", "float32", "bfloat16"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "refused" not in out.splitlines()[-2]
    assert "0 checks on 0 backends, nothing could run; 2 refused by name" in out
    assert main([*arguments, "--details"]) == 0
    assert capsys.readouterr().out.count("refused: layer_norm: not today.") == 2


def test_what_is_hidden_does_leak_without_a_mask():
    """The NaN behind the mask is there: a function that does not mask is found."""
    (check,) = (c for c in checks() if c.hidden)

    def leaks(q, k, v, mask, backend):
        return fastattn.attention(q, k, v, backend=backend)

    broken = Check(check.name, check.theirs, leaks, check.shapes, check.constants, check.hidden)
    (report,) = examine(prepare(broken, torch.float32, CPU), ["eager"])
    assert report.status == "wrong"
    assert {f.tensor for f in report.findings if f.error == float("inf")} >= {"y", "dq"}


@pytest.mark.parametrize("check", checks(), ids=lambda check: check.name)
def test_what_is_said_to_be_torchs_is_the_reference(check):
    """Two people wrote the same equation: torch's way in float64 is what the reference computes."""
    inputs, _ = check.inputs(torch.float64, CPU)
    constants = in_float64(check.constants(CPU))
    ours = check.ours(**inputs, **constants, backend="reference")
    torch.testing.assert_close(ours, check.theirs(**inputs, **constants))


def test_torchs_operations_are_given_one_thread_and_kernels_all(monkeypatch):
    """A busy machine is then no reason to take minutes; and kernels are checked as they will run."""
    seen = {}

    def halve(x, backend="torch"):
        seen[backend] = torch.get_num_threads()
        return x / 2

    monkeypatch.setattr(backends.get("eager"), "COMPOSITE", False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check = Check("half", halve, halve, {"x": (9, 9)})
        reports = list(examined([check], [torch.float32], CPU, ["eager", "reference"]))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {"torch": 1, "eager": 3, "reference": 1}
    assert [(report.backend, report.status) for report in reports] == [("reference", "ok"), ("eager", "ok")]


def test_an_overflow_of_torch_is_no_excuse():
    def square(x, backend=None):
        return (1e3 * x).square() / 1e6

    check = Check("overflow", square, square, {"x": (9, 9)})
    (report,) = examine(prepare(check, torch.float16, CPU), ["eager"])
    assert report.status == "wrong"
    assert report.worst.torch_error == float("inf")


def test_names_are_unique_and_every_function_is_checked():
    names = [check.name for check in checks()]
    assert len(set(names)) == len(names)
    functions = {
        "attention", "varlen_attention", "layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy",
        "linear_cross_entropy", "rotary_embedding", "swiglu", "geglu", "dropout_add",
    }  # fmt: skip
    assert functions == {name.split(",")[0].split(" of ")[0] for name in names}
    assert functions | {"explain", "scaled_dot_product_attention"} >= {
        name for name in fastattn.__all__ if callable(getattr(fastattn, name)) and name.islower()
    }


def test_an_unknown_check_is_refused_with_the_known_ones():
    done = run("verify", "--op", "conv")
    assert done.returncode == 2
    assert "`--op` is 'conv'; no check's name contains it. They are: attention, plain" in done.stderr


def test_backends_can_be_chosen(capsys):
    assert main(["verify", "--device", "cpu", "--backend", "reference", "--op", "softmax, causal", "--details"]) == 0
    out = capsys.readouterr().out
    assert out.count(" reference ") == 2 * len(DTYPES)  # y and dx
    assert "  eager" not in out
    assert backends.ORDER

"""`bench model`: step time and memory of training a GPT on N GPUs, predicted from what one device was measured to do.

The equations are in docs/scaling.md. Nothing here is fitted: rates come from a run of the suite, the rest from the
sizes of the model and the bandwidth of the links, which is an argument. `--check` holds the prediction to the layers
and training steps that the same run measured on one device.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.results import Results, Row, read_json
from benchmarks.summary import duels, fastest, geometric_mean
from fastattn.cli import arguments
from fastattn.errors import ArgumentError

HALF, SINGLE = 2, 4  # bytes
# Passes over the (tokens, d_model) activations that a layer's norms, residual sums and activation make: two norms with
# their residual sums 4 and 3 passes, the feed-forward's activation 4 · (2 and 3).
FORWARD_PASSES, BACKWARD_PASSES = 2 * 4 + 8, 2 * 3 + 12
METHODS = ("ring", "ulysses")


@dataclass(frozen=True)
class Model:
    """A GPT: feed-forward of 4 · d_model, output layer tied to the embedding."""

    layers: int = 32
    d_model: int = 4096
    heads: int = 32
    kv_heads: int = 8
    V: int = 128_256
    S: int = 8192

    @property
    def D(self) -> int:
        return self.d_model // self.heads

    @property
    def layer_parameters(self) -> int:
        projections = 2 * self.d_model**2 + 2 * self.d_model * self.kv_heads * self.D  # q, o; k, v
        return projections + 8 * self.d_model**2

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.V * self.d_model

    def products(self, tokens: float) -> float:
        """FLOPs of the forward's matrix products with parameters."""
        return 2.0 * tokens * self.parameters

    def attention(self, tokens: float) -> float:
        """FLOPs of causal attention forward, over all layers."""
        return self.layers * 4.0 * tokens * (self.S + 1) / 2 * self.d_model


@dataclass(frozen=True)
class Rates:
    """What one device does, and what a link between two carries one way."""

    products: float  # FLOP/s
    attention_forward: float  # FLOP/s
    attention_backward: float  # FLOP/s
    memory: float  # bytes/s
    link: float = math.inf  # bytes/s

    @classmethod
    def of(cls, results: Results, model: Model, dtype: str, link: float = math.inf) -> Rates:
        """From a run: attention at the length and head dimension nearest to the model's, ours where it was right."""
        products = results.ceilings.get(f"flops_per_s_{dtype}")
        if products is None:
            known = [name.removeprefix("flops_per_s_") for name in results.ceilings if name.startswith("flops")]
            raise ArgumentError(f"`--dtype` is {dtype!r}; that run measured {', '.join(known) or 'none'}.")
        forward, backward = (attention_rate(results, model, dtype, d) for d in ("forward", "backward"))
        return cls(products, forward, backward, results.ceilings["bytes_per_s"], link)


def attention_rate(results: Results, model: Model, dtype: str, direction: str) -> float:
    """FLOP/s of fastattn's causal attention at the measured point that is nearest; of all providers if it has none."""
    rows = [
        row
        for row in results.rows
        if row.family == "attention" and row.direction == direction and row.dtype == dtype and row.status == "ok"
        if "causal" in row.series and row.tflops
    ]
    rows = [row for row in rows if row.ours] or rows
    if not rows:
        raise ArgumentError(f"these results have no causal attention {direction} in {dtype}; run `bench attention`.")

    def distance(row: Row) -> tuple[float, float]:
        D = int(row.series.split()[0].removeprefix("D"))
        return abs(math.log2(D / model.D)), abs(math.log2(row.size / model.S))

    nearest = min(map(distance, rows))
    chosen = fastest([row for row in rows if distance(row) == nearest])
    assert chosen is not None
    assert chosen.tflops is not None
    return chosen.tflops * 1e12


@dataclass(frozen=True)
class Layout:
    """N GPUs: `context` of them share each sequence, and gpus / context replicas share the batch.

    `sharded`: parameters, gradients and optimizer state are spread over all GPUs and gathered a layer at a time.
    """

    gpus: int = 1
    context: int = 1
    method: str = "ring"
    sharded: bool = True
    sequences: int = 1  # in a replica's batch

    @property
    def replicas(self) -> int:
        return self.gpus // self.context


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes on each GPU."""

    products: float
    attention: float
    memory_bound: float
    context_exchange: float  # that attention does not hide
    gradient_exchange: float  # that the backward does not hide
    parameters_bytes: float  # with gradients and optimizer state
    activations_bytes: float

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.memory_bound

    @property
    def seconds(self) -> float:
        return self.compute + self.context_exchange + self.gradient_exchange

    @property
    def bytes(self) -> float:
        return self.parameters_bytes + self.activations_bytes


def predict(model: Model, layout: Layout, rates: Rates) -> Prediction:
    """One training step: forward, backward, and the exchange of gradients."""
    tokens = layout.sequences * model.S / layout.context  # on one GPU
    forward = model.attention(tokens) / rates.attention_forward
    backward = 2.5 * model.attention(tokens) / rates.attention_backward
    products = 3 * model.products(tokens) / rates.products
    moved = (FORWARD_PASSES + BACKWARD_PASSES) * model.layers * tokens * model.d_model * HALF
    return Prediction(
        products,
        forward + backward,
        moved / rates.memory,
        context_exchange(model, layout, rates, tokens, forward, backward),
        gradient_exchange(model, layout, rates, 2 / 3 * products + backward),
        parameter_bytes(model, layout),
        activation_bytes(model, tokens),
    )


def context_exchange(
    model: Model, layout: Layout, rates: Rates, tokens: float, forward: float, backward: float
) -> float:
    """Ring: c - 1 times k and v pass on, behind the arithmetic of one block, with dk and dv on the way back.

    Ulysses: before attention q, k and v, and after it o, change places, and so do all gradients; nothing hides it.
    """
    c = layout.context
    if c == 1:
        return 0.0
    kv = 2 * tokens * model.kv_heads * model.D * HALF * model.layers
    q = tokens * model.d_model * HALF * model.layers
    if layout.method == "ulysses":
        return 2 * (kv + 2 * q) * (c - 1) / c / rates.link
    passing = kv / rates.link
    exposed_forward = max(0.0, passing - forward / c)
    exposed_backward = max(0.0, 3 * passing - backward / c)  # k, v; and dk, dv in float32
    return (c - 1) * (exposed_forward + exposed_backward)


def gradient_exchange(model: Model, layout: Layout, rates: Rates, backward: float) -> float:
    """All-reduce over all GPUs, or with sharding a reduce-scatter and two gathers; hidden by the backward."""
    if layout.gpus == 1:
        return 0.0
    passes = 3 if layout.sharded else 2
    sent = passes * (layout.gpus - 1) / layout.gpus * model.parameters * HALF
    return max(0.0, sent / rates.link - backward)


def parameter_bytes(model: Model, layout: Layout) -> float:
    """bf16 parameters and gradients, float32 master copy and two moments of Adam; sharded: of all but one layer."""
    each = 2 * HALF + 3 * SINGLE
    if not layout.sharded or layout.gpus == 1:
        return each * model.parameters
    gathered = 2 * HALF * max(model.layer_parameters, model.V * model.d_model)
    return each * model.parameters / layout.gpus + gathered


def activation_bytes(model: Model, tokens: float) -> float:
    """What a layer keeps for its backward, with fused kernels: no scores, no second copy behind norm and activation.

    In halves of d_model a token: the two sums 2, q and o 2, k and v 2 · kv_heads / heads, the norms' results 2, the
    feed-forward's 4 before and 4 after its activation. The loss keeps the gradient of its input.
    """
    per_token = (2 + 2 + 2 * model.kv_heads / model.heads + 2 + 8) * model.d_model * HALF
    return tokens * (model.layers * per_token + 2 * model.d_model * HALF)


def layouts(gpus: int, model: Model, sequences: int) -> list[Layout]:
    """Data parallelism, and both ways of sharing a sequence, by degrees that divide N and the heads where they must."""
    found = [
        Layout(gpus, sharded=sharded, sequences=sequences) for sharded in ((False, True) if gpus > 1 else (False,))
    ]
    degrees = [c for c in range(2, gpus + 1) if gpus % c == 0 and c & (c - 1) == 0]
    for method in METHODS:
        found += [
            Layout(gpus, c, method, True, sequences) for c in degrees if method == "ring" or model.kv_heads % c == 0
        ]
    return found


def label(layout: Layout) -> str:
    sharing = "sharded" if layout.sharded else "replicated"
    return sharing if layout.context == 1 else f"{sharing}, {layout.method} of {layout.context}"


def check(results: Results) -> list[tuple[Row, float]]:
    """The layers and training steps of a run, fastattn's fastest of each, with what is predicted for it, in seconds."""
    found = []
    for row in (duel.ours for duel in duels(results)):
        if row is None or row.family not in ("layer", "train_step"):
            continue
        model, sequences = measured_model(row)
        rates = Rates.of(results, model, row.dtype)
        itemsize = 4 if row.dtype == "float32" else 2
        predicted = predict(model, Layout(sequences=sequences), replace(rates, memory=rates.memory * HALF / itemsize))
        found.append((row, predicted.seconds))
    return found


def measured_model(row: Row) -> tuple[Model, int]:
    """The model behind a measured row, and its batch."""
    from benchmarks import families
    from benchmarks.problems.models import ModelProblem, TrainStepProblem

    for gpu in (True, False):
        for workload in families.models(gpu):
            if (workload.family, workload.name) == (row.family, row.name):
                problem = workload.problem
                assert isinstance(problem, ModelProblem)
                whole = isinstance(problem, TrainStepProblem)
                layers, V = (problem.layers, problem.V) if isinstance(problem, TrainStepProblem) else (1, 0)
                assert whole or V == 0
                return Model(layers, problem.d_model, problem.heads, problem.heads, V, problem.S), problem.B
    raise ArgumentError(f"{row.family} {row.name} is no workload of this version of the suite.")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m fastattn bench model", description=__doc__.split("\n\n")[0])
    p.add_argument("--gpus", type=arguments.positive, default=8, metavar="N")
    p.add_argument("--results", type=Path, required=True, metavar="FILE", help="results.json of one such GPU")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument(
        "--link",
        type=arguments.positive_number,
        default=450.0,
        metavar="GB/s",
        help="one way between GPUs; NVLink 4: 450",
    )
    for name, value in asdict(Model()).items():
        p.add_argument(f"--{name.replace('_', '-')}", type=arguments.positive, default=value, dest=name)
    p.add_argument("--sequences", type=arguments.positive, default=1, metavar="B", help="in the batch of each replica")
    p.add_argument("--check", action="store_true", help="compare with the layers and steps that the run measured")
    p.add_argument("--json", type=arguments.new_file, metavar="FILE")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    model = Model(**{name: getattr(args, name) for name in asdict(Model())})
    validate(model)
    results = read_json(args.results)
    if args.check:
        return print_check(results)
    rates = Rates.of(results, model, args.dtype, args.link * 1e9)
    found = {
        label(layout): (layout, predict(model, layout, rates)) for layout in layouts(args.gpus, model, args.sequences)
    }
    print_predictions(model, rates, found, args.gpus)
    if args.json:
        table = {name: asdict(layout) | asdict(p) | {"seconds": p.seconds} for name, (layout, p) in found.items()}
        args.json.write_text(json.dumps({"model": asdict(model), "rates": asdict(rates), "layouts": table}, indent=1))
    return 0


def validate(model: Model) -> None:
    if model.d_model % model.heads or model.heads % model.kv_heads:
        raise ArgumentError(
            f"`--heads` is {model.heads} and `--kv-heads` {model.kv_heads}; "
            f"heads must divide d_model = {model.d_model}, and kv_heads must divide heads."
        )


def print_predictions(model: Model, rates: Rates, found: dict[str, tuple[Layout, Prediction]], gpus: int) -> None:
    print(
        f"{model.parameters / 1e9:.2f} G parameters, {model.layers} layers of {model.d_model}, S = {model.S}, "
        f"{gpus} GPUs\n"
        f"measured: products {rates.products / 1e12:.3g}, attention {rates.attention_forward / 1e12:.3g} forward and "
        f"{rates.attention_backward / 1e12:.3g} backward TFLOP/s, memory {rates.memory / 1e9:.0f} GB/s\n"
    )
    print(
        f"{'':<26}{'products':>10}{'attention':>11}{'passes':>9}{'exchange':>10}{'step ms':>10}"
        f"{'tokens/s':>11}{'GiB':>8}"
    )
    for name, (layout, p) in found.items():
        tokens = layout.replicas * layout.sequences * model.S
        exchange = p.context_exchange + p.gradient_exchange
        print(
            f"{name:<26}{p.products * 1e3:>10.1f}{p.attention * 1e3:>11.1f}{p.memory_bound * 1e3:>9.1f}"
            f"{exchange * 1e3:>10.1f}{p.seconds * 1e3:>10.1f}{tokens / p.seconds:>11,.0f}{p.bytes / 2**30:>8.1f}"
        )


def print_check(results: Results) -> int:
    """Predicted beside measured; says how far apart, and judges nothing: the reader does."""
    found = check(results)
    if not found:
        raise ArgumentError("these results have no layer or training step; run `bench layer train_step attention`.")
    for row, predicted in found:
        assert row.seconds
        print(
            f"{row.family} {row.name}, {row.dtype}: predicted {predicted * 1e3:.2f} ms, "
            f"measured {row.seconds * 1e3:.2f} ms, ratio {predicted / row.seconds:.2f}"
        )
    ratios = [predicted / row.seconds for row, predicted in found if row.seconds]
    print(f"geometric mean {geometric_mean(ratios):.2f}")
    return 0

"""Train the same small language model twice, with torch.nn and with fastattn.nn, and compare.

The text is Python's own standard library. Both runs start from the same parameters and see the same batches, so their
losses should agree to rounding; speed and memory are what may differ. Each runs in a process of its own.

    python examples/train_lm.py                      # defaults chosen for the device that is there
    python examples/train_lm.py --steps 50 --seq 64  # smaller; --help lists the rest

Leaves in --out: losses.png, losses.csv, summary.json.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
import torch.nn.functional as F
from corpus import Tokenizer, standard_library
from gpt import GPT
from report import Run, format_report, write_files
from torch import Tensor
from tqdm import tqdm

import fastattn

LIBRARIES = {"torch.nn": torch.nn, "fastattn.nn": fastattn.nn}
TOKENIZER_TEXT = 3_000_000  # characters that the tokenizer is trained on
WARMUP = 10  # steps in which the learning rate rises, and which tell how many fit into --seconds
PROMPT = 'class Reader:\n    """Read lines from a file."""\n\n    def __init__(self, '

SMALL = {"d_model": 128, "layers": 4, "heads": 4, "seq": 128, "batch": 8, "steps": 800, "seconds": 80, "lr": 2e-3}
LARGE = {"d_model": 768, "layers": 12, "heads": 12, "seq": 1024, "batch": 16, "steps": 400, "seconds": 120, "lr": 6e-4}


@dataclass
class Corpus:
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


def positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 runs under autocast")
    parser.add_argument("--steps", type=positive_int, help="at most this many optimizer steps a run")
    parser.add_argument("--seconds", type=float, help="about as long as a run may take; 0: no limit")
    parser.add_argument("--d-model", type=positive_int, help="width of the residual stream")
    parser.add_argument("--layers", type=positive_int)
    parser.add_argument("--heads", type=positive_int)
    parser.add_argument("--seq", type=positive_int, help="tokens in a sequence")
    parser.add_argument("--batch", type=positive_int, help="sequences in a batch")
    parser.add_argument(
        "--vocabulary", type=positive_int, default=1024, help="tokens of the byte-pair code; 256: plain bytes"
    )
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/train_lm"), help="folder for the results")
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type != "cpu"
    for name, value in (LARGE if on_gpu else SMALL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    if args.vocabulary < 256:
        parser.error(f"--vocabulary must be at least 256, one for each byte, but is {args.vocabulary}.")
    if args.d_model % args.heads:
        parser.error(f"--d-model must be a multiple of --heads, but {args.d_model} is not one of {args.heads}.")
    return args


def load_corpus(vocabulary: int) -> Corpus:
    train, validation = standard_library()
    tokenizer = Tokenizer.train(train[:TOKENIZER_TEXT], vocabulary)
    return Corpus(tokenizer, *(tokenizer.encode(text).astype(np.int32) for text in (train, validation)))


def draw_batch(data: Tensor, args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (B, S): targets are the inputs one token later."""
    start = torch.randint(len(data) - args.seq, (args.batch, 1), generator=generator)
    tokens = data[start + torch.arange(args.seq + 1)].long().to(args.device)
    return tokens[:, :-1], tokens[:, 1:]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def autocast(args: argparse.Namespace) -> AbstractContextManager:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def loss_of(model: GPT, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> Tensor:
    with autocast(args):
        logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def train(library: str, corpus: Corpus, args: argparse.Namespace) -> Run:
    """One run from initialisation to a sample of text. Ctrl-C ends the training early and keeps what there is."""
    torch.manual_seed(args.seed)
    model = GPT(LIBRARIES[library], args.vocabulary, args.d_model, args.layers, args.heads, args.seq).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    parameters = sum(p.numel() for p in model.parameters())
    run = Run(library, parameters, tokens_per_step=args.batch * args.seq)
    try:
        optimize(model, optimizer, torch.from_numpy(corpus.train), run, args)
    except KeyboardInterrupt:
        run.interrupted = True
    run.peak_bytes = peak_memory(args.device)

    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    validation = torch.from_numpy(corpus.validation)
    with torch.no_grad():
        batches = [draw_batch(validation, args, generator) for _ in range(16)]
        run.validation_loss = fmean(loss_of(model, batch, args).item() for batch in batches)
    with autocast(args):
        prompt = torch.from_numpy(corpus.tokenizer.encode(PROMPT)).to(args.device)
        run.sample = corpus.tokenizer.decode(model.generate(prompt, count=150).tolist())
    if library == "fastattn.nn":
        explain_backends(run, args)
    return run


def optimize(model: GPT, optimizer: torch.optim.Optimizer, data: Tensor, run: Run, args: argparse.Namespace) -> None:
    """Train until `--steps` are done. What they come to is settled after the warm-up, so that they fit `--seconds`."""
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.steps
    # A bar redraws itself on a terminal; in a log each update is a line, so there are few.
    interval = 0.2 if sys.stderr.isatty() else 15.0
    with tqdm(total=steps, desc=f"{run.library:<11}", unit="step", mininterval=interval) as bar:
        while len(run.losses) < steps:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(len(run.losses), steps, args.lr)
            loss = loss_of(model, draw_batch(data, args, generator), args)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value = loss.item()  # waits for the device, so the clock below is right
            run.seconds.append(time.perf_counter() - began)
            run.losses.append(value)

            if len(run.losses) == WARMUP and args.seconds:
                steps = min(steps, max(WARMUP, int(args.seconds / median(run.seconds))))
                bar.total = steps
            speed = run.tokens_per_step / run.seconds[-1]
            bar.set_postfix_str(f"loss {value:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()


def peak_memory(device: str) -> int:
    """Bytes: allocated on the GPU, or resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def explain_backends(run: Run, args: argparse.Namespace) -> None:
    """Ask fastattn what serves the model's attention and LayerNorm calls, and why."""
    head_dim = args.d_model // args.heads
    q = torch.empty(args.batch, args.heads, args.seq, head_dim, device=args.device, dtype=getattr(torch, args.dtype))
    x = torch.empty(args.batch, args.seq, args.d_model, device=args.device)  # the residual stream stays in float32
    weight = torch.empty(args.d_model, device=args.device)
    for op, explanation in {
        "attention": fastattn.explain(fastattn.attention, q, q, q, causal=True),
        "layer_norm": fastattn.explain(fastattn.layer_norm, x, (args.d_model,), weight, weight),
    }.items():
        run.backends[op] = explanation.backend or "nothing"
        run.explanations.append(str(explanation))


def run_in_own_process(library: str, corpus: Corpus, args: argparse.Namespace) -> Run | None:
    """`train` in a fresh process, so that neither run's memory or caches touch the other. None if it was cut off."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(train, library, corpus, args)
        try:
            try:
                return future.result()
            except KeyboardInterrupt:  # the terminal sends Ctrl-C to the child too, which stops and hands over
                return future.result()
        except BrokenProcessPool:
            return None


def main() -> int:
    args = parse_arguments()
    began = time.perf_counter()
    corpus = load_corpus(args.vocabulary)
    print(
        f"Python's standard library: {len(corpus.train):,} tokens to train on, {len(corpus.validation):,} held out. "
        f"Device: {args.device}, {args.dtype}.",
        flush=True,
    )
    runs: list[Run] = []
    complete = True
    for library in LIBRARIES:
        run = run_in_own_process(library, corpus, args)
        complete = run is not None and not run.interrupted
        if run is not None and run.losses:
            runs.append(run)
        if not complete:
            print(f"The {library} run was cut off; this is what there is.", file=sys.stderr)
            break
        args.steps, args.seconds = len(runs[0].losses), None  # the second run takes exactly as many steps
    if not runs:
        return 130
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_files(runs, {"torch": torch.__version__, **settings}, args.out)
    print(f"\n{format_report(runs)}\n")
    print(f"Loss curves in {args.out / 'losses.png'}, numbers in losses.csv and summary.json beside it.")
    print(f"Took {time.perf_counter() - began:.0f} s.")
    return 0 if complete else 130


if __name__ == "__main__":
    sys.exit(main())

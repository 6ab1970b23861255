"""`explain`: which backend would run a call, and why each one before it was passed over."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

import fastattn
from fastattn import backends

Functions = argparse._SubParsersAction  # of the parsers of one function each
DTYPES = ("bfloat16", "float16", "float32", "float64")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("explain", help="which backend would run a call, and why not the others")
    functions = parser.add_subparsers(required=True, metavar="FUNCTION")
    add_attention(functions)
    add_norms(functions)
    add_softmax(functions)
    add_elementwise(functions)
    add_losses(functions)
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for function in functions.choices.values():
        function.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        function.add_argument("--device", choices=(*gpus, "cpu"), default=gpus[0] if gpus else "cpu")
        function.add_argument("--backend", choices=backends.ORDER, help="ask for this one, as backend= does")
        function.set_defaults(run=run)


def add_attention(functions: Functions) -> None:
    attention = functions.add_parser("attention", help="fused attention")
    attention.add_argument("--shape", type=int, nargs=4, default=(2, 8, 1024, 64), metavar=("B", "H", "S_q", "D"))
    attention.add_argument("--keys", type=int, metavar="S_k", help="length of k and v; default: S_q")
    attention.set_defaults(call=attention_call)

    varlen = functions.add_parser("varlen_attention", help="the same over packed sequences of unequal lengths")
    varlen.add_argument("--lengths", type=int, nargs="+", default=(1000, 24, 511), metavar="S_q")
    varlen.add_argument("--keys", type=int, nargs="+", metavar="S_k", help="lengths of k and v; default: --lengths")
    varlen.add_argument("--heads", type=int, default=8, metavar="H")
    varlen.add_argument("--head-dim", type=int, default=64, metavar="D")
    varlen.set_defaults(call=varlen_attention_call)

    for function in (attention, varlen):
        function.add_argument("--kv-heads", type=int, metavar="H_kv", help="heads of k and v; default: H")
        function.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="-1: unbounded")
        function.add_argument("--softcap", type=float)
        add_causal(function)


def add_norms(functions: Functions) -> None:
    layer_norm = functions.add_parser("layer_norm", help="layer normalisation over the last dimension")
    layer_norm.set_defaults(call=layer_norm_call)
    rms_norm = functions.add_parser("rms_norm", help="root-mean-square normalisation over the last dimension")
    rms_norm.set_defaults(call=rms_norm_call)
    for function in (layer_norm, rms_norm):
        add_shape(function)
        function.add_argument("--residual", action="store_true", help="behind the sum of a residual connection")
        function.add_argument(
            "--dropout", type=float, default=0.0, metavar="P", help="of what is added to the residual"
        )


def add_softmax(functions: Functions) -> None:
    softmax = functions.add_parser("softmax", help="softmax over one dimension")
    add_shape(softmax)
    softmax.add_argument("--dim", type=int, default=-1)
    add_causal(softmax)
    softmax.set_defaults(call=softmax_call)


def add_elementwise(functions: Functions) -> None:
    rotary = functions.add_parser("rotary_embedding", help="rotary position embedding of q and k")
    rotary.add_argument("--shape", type=int, nargs=4, default=(2, 8, 1024, 64), metavar=("B", "H", "S", "D"))
    rotary.set_defaults(call=rotary_call)
    for name, what in (
        ("swiglu", "gated activation with silu"),
        ("geglu", "gated activation with gelu"),
        ("dropout_add", "dropout and the addition of a residual"),
    ):
        function = functions.add_parser(name, help=what)
        add_shape(function)
        function.set_defaults(call=pair_call, function=name)


def add_losses(functions: Functions) -> None:
    loss = functions.add_parser("cross_entropy", help="cross entropy of logits with classes")
    add_shape(loss, (4096, 32_000), "of the logits")
    loss.set_defaults(call=cross_entropy_call)
    linear_loss = functions.add_parser("linear_cross_entropy", help="the same of a linear layer, without its logits")
    add_shape(linear_loss, what="of hidden")
    linear_loss.add_argument("--classes", type=int, default=32_000, metavar="V")
    linear_loss.set_defaults(call=linear_cross_entropy_call)
    for function in (loss, linear_loss):
        function.add_argument("--z-loss", type=float, default=0.0)
        function.add_argument("--softcap", type=float)


def add_shape(parser: argparse.ArgumentParser, default: Sequence[int] = (4096, 1024), what: str | None = None) -> None:
    parser.add_argument("--shape", type=int, nargs="+", default=default, metavar="SIZE", help=what)


def add_causal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--causal", nargs="?", const=True, default=False, choices=("top_left", "bottom_right"))


def run(args: argparse.Namespace) -> int:
    print(args.call(args))
    return 0


def empty(args: argparse.Namespace, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, args.dtype), device=args.device)


def attention_call(args: argparse.Namespace) -> backends.Explanation:
    B, H, S_q, D = args.shape
    H_kv = H if args.kv_heads is None else args.kv_heads
    S_k = S_q if args.keys is None else args.keys
    q, k, v = empty(args, B, H, S_q, D), empty(args, B, H_kv, S_k, D), empty(args, B, H_kv, S_k, D)
    return fastattn.explain(fastattn.attention, q, k, v, **attention_options(args))


def varlen_attention_call(args: argparse.Namespace) -> backends.Explanation:
    lengths_q = args.lengths
    lengths_k = lengths_q if args.keys is None else args.keys
    H_kv = args.heads if args.kv_heads is None else args.kv_heads
    q, k, v = (
        empty(args, sum(lengths), heads, args.head_dim)
        for lengths, heads in ((lengths_q, args.heads), (lengths_k, H_kv), (lengths_k, H_kv))
    )
    cu_seqlens_q = cu_seqlens(args, lengths_q)
    cu_seqlens_k = cu_seqlens_q if args.keys is None else cu_seqlens(args, lengths_k)  # one tensor: causal is clear
    return fastattn.explain(
        fastattn.varlen_attention,
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max(lengths_q), max(lengths_k)),
        **attention_options(args),
    )


def cu_seqlens(args: argparse.Namespace, lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=args.device)


def attention_options(args: argparse.Namespace) -> dict[str, Any]:
    window = None if args.window is None else tuple(None if side == -1 else side for side in args.window)
    return {"causal": args.causal, "window": window, "softcap": args.softcap, "backend": args.backend}


def layer_norm_call(args: argparse.Namespace) -> backends.Explanation:
    x = empty(args, *args.shape)
    weight, bias = empty(args, args.shape[-1]), empty(args, args.shape[-1])
    return fastattn.explain(fastattn.layer_norm, x, args.shape[-1:], weight, bias, **norm_options(args, x))


def rms_norm_call(args: argparse.Namespace) -> backends.Explanation:
    x = empty(args, *args.shape)
    weight = empty(args, args.shape[-1])
    return fastattn.explain(fastattn.rms_norm, x, args.shape[-1:], weight, **norm_options(args, x))


def norm_options(args: argparse.Namespace, x: torch.Tensor) -> dict[str, Any]:
    return {"residual": x if args.residual else None, "dropout_p": args.dropout, "backend": args.backend}


def softmax_call(args: argparse.Namespace) -> backends.Explanation:
    return fastattn.explain(
        fastattn.softmax, empty(args, *args.shape), args.dim, causal=args.causal, backend=args.backend
    )


def rotary_call(args: argparse.Namespace) -> backends.Explanation:
    q, angles = empty(args, *args.shape), empty(args, args.shape[2], args.shape[3] // 2)
    return fastattn.explain(fastattn.rotary_embedding, (q, q), angles, angles, backend=args.backend)


def pair_call(args: argparse.Namespace) -> backends.Explanation:
    x = empty(args, *args.shape)
    return fastattn.explain(getattr(fastattn, args.function), x, x, backend=args.backend)


def cross_entropy_call(args: argparse.Namespace) -> backends.Explanation:
    dim = min(1, len(args.shape) - 1)
    target = classes(args, *args.shape[:dim], *args.shape[dim + 1 :])
    return fastattn.explain(fastattn.cross_entropy, empty(args, *args.shape), target, **loss_options(args))


def linear_cross_entropy_call(args: argparse.Namespace) -> backends.Explanation:
    hidden, weight = empty(args, *args.shape), empty(args, args.classes, args.shape[-1])
    target = classes(args, *args.shape[:-1])
    return fastattn.explain(fastattn.linear_cross_entropy, hidden, weight, target, **loss_options(args))


def classes(args: argparse.Namespace, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=args.device)


def loss_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"z_loss": args.z_loss, "softcap": args.softcap, "backend": args.backend}

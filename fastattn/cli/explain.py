"""`explain`: which backend would run a call, and why each one before it was passed over."""

from __future__ import annotations

import argparse

import torch

import fastattn
from fastattn import backends

DTYPES = ("bfloat16", "float16", "float32", "float64")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("explain", help="which backend would run a call, and why not the others")
    functions = parser.add_subparsers(required=True, metavar="FUNCTION")

    attention = functions.add_parser("attention", help="fused attention")
    attention.add_argument("--shape", type=int, nargs=4, default=(2, 8, 1024, 64), metavar=("B", "H", "S_q", "D"))
    attention.add_argument("--kv-heads", type=int, metavar="H_kv", help="heads of k and v; default: H")
    attention.add_argument("--keys", type=int, metavar="S_k", help="length of k and v; default: S_q")
    attention.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="-1: unbounded")
    attention.add_argument("--softcap", type=float)
    add_causal(attention)
    attention.set_defaults(call=attention_call)

    layer_norm = functions.add_parser("layer_norm", help="layer normalisation over the last dimension")
    layer_norm.add_argument("--shape", type=int, nargs="+", default=(4096, 1024), metavar="SIZE")
    layer_norm.set_defaults(call=layer_norm_call)

    softmax = functions.add_parser("softmax", help="softmax over one dimension")
    softmax.add_argument("--shape", type=int, nargs="+", default=(4096, 1024), metavar="SIZE")
    softmax.add_argument("--dim", type=int, default=-1)
    add_causal(softmax)
    softmax.set_defaults(call=softmax_call)

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for function in (attention, layer_norm, softmax):
        function.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        function.add_argument("--device", choices=(*gpus, "cpu"), default=gpus[0] if gpus else "cpu")
        function.add_argument("--backend", choices=backends.ORDER, help="ask for this one, as backend= does")
        function.set_defaults(run=run)


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
    window = None if args.window is None else tuple(None if side == -1 else side for side in args.window)
    return fastattn.explain(
        fastattn.attention, q, k, v, causal=args.causal, window=window, softcap=args.softcap, backend=args.backend
    )


def layer_norm_call(args: argparse.Namespace) -> backends.Explanation:
    x = empty(args, *args.shape)
    weight, bias = empty(args, args.shape[-1]), empty(args, args.shape[-1])
    return fastattn.explain(fastattn.layer_norm, x, args.shape[-1:], weight, bias, backend=args.backend)


def softmax_call(args: argparse.Namespace) -> backends.Explanation:
    return fastattn.explain(
        fastattn.softmax, empty(args, *args.shape), args.dim, causal=args.causal, backend=args.backend
    )

"""`bench`: the benchmark suite, which lies beside the package in a checkout; it is not installed."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import fastattn
from fastattn.errors import UnsupportedError

COMMANDS = {  # first word -> module and function; anything else is `bench [family…]`
    "list": ("benchmarks.main", "list_everything"),
    "compare": ("benchmarks.compare", "main"),
    "overhead": ("benchmarks.overhead", "main"),
    "model": ("benchmarks.scaling", "main"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """For the list of commands; the arguments are the suite's own, see `main`."""
    subparsers.add_parser("bench", help="times fastattn beside every peer installed (from a checkout)")


def main(argv: Sequence[str]) -> int:
    """
    Raises:
        UnsupportedError: fastattn does not run from a checkout.
    """
    root = Path(fastattn.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "main.py").exists():
        raise UnsupportedError(
            "bench: the benchmark suite is not installed with the package; run it in a checkout of fastattn's source."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("", argv)
    module, function = COMMANDS.get(name, ("benchmarks.main", "run"))
    return getattr(importlib.import_module(module), function)(rest)

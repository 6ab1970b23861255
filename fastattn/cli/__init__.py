"""`python -m fastattn COMMAND`. One module per command, each with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastattn.cli import bench, build, explain, info, inspect, tune, verify
from fastattn.errors import FastattnError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status: 0, 1 for a failed check, 2 for a wrong argument."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("python -m fastattn", description="What fastattn would run here, and how well.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (info, explain, verify, build, inspect, bench, tune):
        command.add_parser(subparsers)
    try:
        if argv[:1] == ["bench"]:  # a suite with commands of its own
            return bench.main(argv[1:])
        args = parser.parse_args(argv, argparse.Namespace(argv=argv))
        return args.run(args)
    except FastattnError as error:
        parser.error(str(error))

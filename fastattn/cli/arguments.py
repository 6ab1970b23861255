"""Types of command-line arguments: what cannot be used is refused before anything runs."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {text}")
    return value


def positive_number(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, but is {text}")
    return value


def seconds(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, but is {text}")
    return value


def new_file(text: str) -> Path:
    """A file to be written at the end of a run, whose folder is there now."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {path.parent} is no folder")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: permission denied")
    return path

"""What fastattn raises. Each message is a sentence: the argument, what came, what is accepted."""

from __future__ import annotations

from typing import Any


class FastattnError(Exception):
    """Base of every error that is fastattn's own."""


class ArgumentError(FastattnError, ValueError):
    """An argument has a value, shape, device or layout that the function does not accept."""


class NoMemoryError(ArgumentError, RuntimeError):
    """A tensor has elements and no memory that holds them; torch raises a RuntimeError for it."""


class ArgumentTypeError(FastattnError, TypeError):
    """An argument has a type or dtype that the function does not accept."""


class UnsupportedError(FastattnError, NotImplementedError):
    """The call is well formed, but the backend asked for cannot compute it; the message says which part."""


def kind(value: Any) -> str:
    """What a message calls a value of a wrong type: None, a list, an int."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"

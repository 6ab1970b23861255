"""What fastattn raises. Each message is a sentence: the argument, what came, what is accepted."""

from __future__ import annotations

from typing import Any


class FastattnError(Exception):
    """Base of every error that is fastattn's own."""


class ArgumentError(FastattnError, ValueError, RuntimeError):
    """An argument has a value, shape, device or layout that the function does not accept.

    It is a RuntimeError too, as torch raises for most of these, so that `except` clauses keep catching.
    """


class ArgumentIndexError(ArgumentError, IndexError):
    """A dimension or a class does not exist; torch raises an IndexError for it."""


class NoMemoryError(ArgumentError):
    """A tensor has elements and no memory that holds them; torch raises a RuntimeError for it."""


class ArgumentTypeError(FastattnError, TypeError, RuntimeError):
    """An argument has a type or dtype that the function does not accept; for a dtype torch raises a RuntimeError."""


class UnsupportedError(FastattnError, NotImplementedError):
    """The call is well formed, but the backend asked for cannot compute it; the message says which part."""


def kind(value: Any) -> str:
    """What a message calls a value of a wrong type: None, a list, an int."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"

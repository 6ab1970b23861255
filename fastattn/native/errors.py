"""What the build engine raises. Outside fastattn.errors, because setup.py loads this package without fastattn."""

from __future__ import annotations


class NativeMissing(ImportError):
    """There is no native module that fits; the message says why, and how to get one."""


class ToolMissing(RuntimeError):
    """A compiler or a build tool was not found; the message says where it was looked for, and how to get it."""


class BuildFailed(RuntimeError):
    """The sources do not compile, or not to what was asked for; the message holds what the compiler said."""


class UnsafeCache(RuntimeError):
    """The cache folder is somebody else's, or others may write to it; what lies there must not be loaded."""


class UnknownArch(ValueError):
    """The name of an architecture that is not on the list."""

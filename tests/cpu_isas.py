"""The instruction sets that tests run the CPU kernels for: all that this CPU has, or the one in FASTATTN_CPU_ISA."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from fastattn.backends.cpu import module

NEEDS_MODULE = pytest.mark.skipif(module.why_not() is not None, reason=str(module.why_not()))


@dataclass(frozen=True)
class Isa:
    """A context in which the kernels are those of one instruction set; whatever fails in it names the set."""

    name: str

    def __str__(self) -> str:
        return self.name

    def __enter__(self) -> None:
        module.load().set_isa(self.name)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        module.load().set_isa("")
        if error is not None:
            error.add_note(f"with the kernels for {self.name}")


def _names() -> list[str]:
    if module.why_not():
        return []
    forced = os.environ.get("FASTATTN_CPU_ISA")
    return [forced] if forced else module.load().available_isas()


EVERY_ISA = tuple(Isa(name) for name in _names())

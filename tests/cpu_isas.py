"""The instruction sets of this CPU, for tests that run the CPU backend's kernels for each of them."""

from __future__ import annotations

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


EVERY_ISA = () if module.why_not() else tuple(Isa(name) for name in module.load().available_isas())

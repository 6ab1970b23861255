"""What torch.jit.script needs to know of modules that call kernels."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastattn.errors import UnsupportedError


class Scriptable:
    """Before TorchScript compiles it, a module becomes its class of torch.nn, with the same parameters.

    TorchScript compiles torch's operations and no call of a kernel. A class derived from ours stays itself: it may
    compute something else.
    """

    def _beyond_torch(self) -> str | None:
        """Return the option in use that torch's class does not have."""
        return None

    def __prepare_scriptable__(self) -> Any:
        base: Any = next((c for c in type(self).__mro__ if c.__module__.startswith("torch.nn.")), None)
        if base is None or not type(self).__module__.startswith("fastattn.nn."):
            return self
        if option := self._beyond_torch():
            raise UnsupportedError(
                f"torch.jit.script compiles torch.nn.{base.__name__} in place of {type(self).__name__}, which has no "
                f"{option}; use torch.export or torch.compile."
            )
        twin: nn.Module = base.__new__(base)
        hooks = self.__dict__["_forward_pre_hooks"]
        twin.__dict__ = {**self.__dict__, "_forward_pre_hooks": type(hooks)()}
        twin._forward_pre_hooks.update(
            (k, hook) for k, hook in hooks.items() if not getattr(hook, "of_fastattn", False)
        )
        return twin

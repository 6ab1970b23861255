"""What torch.jit.script needs to know of modules that call kernels."""

from __future__ import annotations

from collections import OrderedDict
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
        state = self.__dict__
        hooks = {key: hook for key, hook in state["_forward_pre_hooks"].items() if not hasattr(hook, "of_fastattn")}
        twin: nn.Module = base.__new__(base)
        # TorchScript prepares the modules below in the dict that it finds.
        own = {"_modules": dict(state["_modules"]), "_forward_pre_hooks": OrderedDict(hooks)}
        twin.__dict__ = {**state, **own}
        return twin

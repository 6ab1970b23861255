"""What torch.jit.script needs to know of modules that call kernels."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from fastattn.errors import UnsupportedError


class Scriptable:
    """Before TorchScript compiles it, a module becomes its class of torch.nn, with the same parameters.

    TorchScript compiles torch's operations and no call of a kernel. What a class derived from ours defines goes on top
    of torch's class.
    """

    def _beyond_torch(self) -> str | None:
        """Return the option in use that torch's class does not have."""
        return None

    def __prepare_scriptable__(self) -> Any:
        base: Any = next((c for c in type(self).__mro__ if c.__module__.startswith("torch.nn.")), None)
        if base is None:
            return self
        if option := self._beyond_torch():
            raise UnsupportedError(
                f"torch.jit.script compiles torch.nn.{base.__name__} in place of {type(self).__name__}, which has no "
                f"{option}; use torch.export or torch.compile."
            )
        state = self.__dict__
        hooks = {key: hook for key, hook in state["_forward_pre_hooks"].items() if not hasattr(hook, "of_fastattn")}
        kind = _over(base, type(self))
        twin: nn.Module = kind.__new__(kind)
        twin.__dict__ = {**state, "_modules": _apart_from(state["_modules"]), "_forward_pre_hooks": OrderedDict(hooks)}
        return twin


def _apart_from(parts: dict[str, nn.Module | None]) -> dict[str, nn.Module | None]:
    """Return the modules in dicts of their own, all the way down: TorchScript changes the dict that it finds."""
    return {name: _apart(part) for name, part in parts.items()}


def _apart(module: nn.Module | None) -> nn.Module | None:
    """Return the module itself if it is prepared by its own class or has no parts, else a copy with its parameters."""
    if module is None or isinstance(module, (Scriptable, torch.jit.ScriptModule)) or not module._modules:
        return module
    kind = type(module)
    twin: nn.Module = kind.__new__(kind)
    twin.__dict__ = {**module.__dict__, "_modules": _apart_from(module._modules)}
    return twin


def _over(base: type[nn.Module], derived: type) -> type[nn.Module]:
    """Return `base` with what the classes between `derived` and ours define; base itself if they define nothing."""
    ours = next(i for i, c in enumerate(derived.__mro__) if c.__module__.startswith("fastattn.nn."))
    defined: dict[str, Any] = {}
    for c in reversed(derived.__mro__[:ours]):
        defined |= {name: value for name, value in vars(c).items() if name not in ("__dict__", "__weakref__")}
    if not any(callable(value) and name != "__init__" for name, value in defined.items()):
        return base
    return type(derived.__name__, (base,), {**defined, "__qualname__": derived.__qualname__})

"""Overrides: which modules and optimizers have code of their own for saving and loading.

Those without are plain: state_dict() returns their tensors by name, and load_state_dict() fills these tensors.
All others are saved and loaded through their own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = [
    "LoadOverrides",
    "has_override",
    "is_patched",
    "load_overrides",
    "optimizer_loads_plainly",
    "optimizer_saves_plainly",
    "saves_plainly",
]

_PLAIN_LOADS = {
    nn.Module._load_from_state_dict,
    _NormBase._load_from_state_dict,  # adds a counter that checkpoints of old torch lack
    _InstanceNorm._load_from_state_dict,  # explains which statistics are unexpected
}
_PLAIN_LOAD_HOOKS = (
    "torch.distributed.fsdp.",  # shards parameters, as state_dict() does, and notes replaced ones
    "torch.distributed._composable.",
    "torch.distributed.algorithms._checkpoint.",  # puts back a prefix that its state_dict() lacks
)
"""Modules of torch whose hooks do nothing that matters where tensors are filled in place."""


@dataclass(frozen=True)
class LoadOverrides:
    """The code of its own that a module runs when it is loaded.

    Attributes:
        prefixes: paths of submodules, each with a final dot, whose code sees all values below it; "" is the
            module itself.
        is_called: True if there is code that is called after a load without seeing values.
    """

    prefixes: tuple[str, ...]
    is_called: bool

    def __bool__(self) -> bool:
        return bool(self.prefixes) or self.is_called

    def see(self, name: str) -> bool:
        """True if code of the module's own sees the value of this name."""
        return name.startswith(self.prefixes)


def load_overrides(module: nn.Module, clean: Callable[[str], str]) -> LoadOverrides:
    """What torch's load_state_dict would call beside torch's code. `clean` turns a path into a clean name."""
    prefixes = [""] if has_override(module, "load_state_dict", [nn.Module.load_state_dict]) else []
    is_called = False
    for path, child in module.named_modules(remove_duplicate=False):
        if has_override(child, "_load_from_state_dict", _PLAIN_LOADS) or not _are_plain(
            child._load_state_dict_pre_hooks.values()
        ):
            prefixes.append(clean(f"{path}.") if path else "")
        is_called |= not _are_plain(child._load_state_dict_post_hooks.values())
    return LoadOverrides(tuple(prefixes), is_called)


def saves_plainly(module: nn.Module) -> bool:
    """True if what the module itself adds to state_dict() depends on its tensors and their names alone."""
    hooks = [*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()]
    return (
        not has_override(module, "state_dict", [nn.Module.state_dict])
        and not has_override(module, "_save_to_state_dict", [nn.Module._save_to_state_dict])
        and type(module).get_extra_state is nn.Module.get_extra_state
        and all(_origin(hook).startswith("torch.") for hook in hooks)
        and isinstance(module._modules, dict)  # those of a ScriptModule are elsewhere
    )


def is_patched(module: nn.Module) -> bool:
    """True if a method that saves was replaced in this very object, which may happen at any time."""
    own = module.__dict__
    return "state_dict" in own or "_save_to_state_dict" in own


def optimizer_saves_plainly(optimizer: torch.optim.Optimizer) -> bool:
    """True if state_dict() is torch's, and no hook sees what it returns."""
    return not (
        has_override(optimizer, "state_dict", [torch.optim.Optimizer.state_dict])
        or optimizer._optimizer_state_dict_pre_hooks
        or optimizer._optimizer_state_dict_post_hooks
    )


def optimizer_loads_plainly(optimizer: torch.optim.Optimizer) -> bool:
    """True if state_dict() and load_state_dict() are torch's, and no hook sees what passes through them."""
    return not (
        has_override(optimizer, "load_state_dict", [torch.optim.Optimizer.load_state_dict])
        or not optimizer_saves_plainly(optimizer)
        or optimizer._optimizer_load_state_dict_pre_hooks
    )


def has_override(value: object, name: str, plain: Iterable[Callable[..., Any]]) -> bool:
    """True if `value` or its class has a method `name` that is none of `plain`."""
    method = getattr(value, name)
    return getattr(method, "__func__", method) not in plain


def _are_plain(hooks: Iterable[Any]) -> bool:
    return all(_origin(hook).startswith(_PLAIN_LOAD_HOOKS) for hook in hooks)


def _origin(hook: Any) -> str:
    """The name of the Python module that defines the hook."""
    return getattr(hook, "__module__", None) or ""

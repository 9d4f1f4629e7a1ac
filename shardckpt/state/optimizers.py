"""Optimizers as named trees: state by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardckpt.errors import UnsupportedValueError
from shardckpt.state.modules import state_of

__all__ = ["check_optimizer", "has_groups", "is_by_number", "optimizer_parameters", "optimizer_tree"]


def optimizer_parameters(
    optimizer: torch.optim.Optimizer, names: Mapping[int, tuple[str, str]]
) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) of each of the optimizer's parameters, in its own order.

    The name is the parameter's name in its module, after the module's path if the optimizer has parameters of
    several modules; or the parameter's number if it is in no module of the state. A name that is taken is
    followed by the number. `names` is what `parameter_names` returns for the state's modules.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    several = len({names[id(p)][0] for p in parameters if id(p) in names}) > 1
    named: dict[str, torch.Tensor] = {}
    for number, parameter in enumerate(parameters):
        path, name = names.get(id(parameter), ("", str(number)))
        full = f"{path}.{name}" if several and path else name
        named[full if full not in named else f"{full} (parameter {number})"] = parameter
    return list(named.items())


def optimizer_tree(
    optimizer: torch.optim.Optimizer, names: Mapping[int, tuple[str, str]], where: str
) -> Any:
    """The optimizer's state_dict with parameters by name; its tensors share memory with the optimizer's.

    A state_dict that does not have torch's form is returned as it is. Raises as `check_optimizer` does.
    """
    check_optimizer(optimizer, where)
    tree = state_of(optimizer, where)
    if not is_by_number(tree, optimizer):
        return tree
    by_number = [name for name, _ in optimizer_parameters(optimizer, names)]
    state = {by_number[key] if isinstance(key, int) else key: value for key, value in tree["state"].items()}
    groups = [
        {**group, "params": [by_number[number] for number in group["params"]]}
        for group in tree["param_groups"]
    ]
    return {**tree, "state": state, "param_groups": groups}


def is_by_number(tree: Any, optimizer: torch.optim.Optimizer) -> bool:
    """True if this has the form of torch's state_dict() of this optimizer: parameters in groups, by number."""
    if not has_groups(tree):
        return False
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    numbers = [group["params"] for group in tree["param_groups"]]
    return [len(n) for n in numbers] == sizes and [n for of in numbers for n in of] == [*range(sum(sizes))]


def has_groups(tree: Any) -> bool:
    """True if this has the parts of an optimizer's state_dict: state, and groups of parameters."""
    return (
        isinstance(tree, Mapping)
        and isinstance(tree.get("state"), Mapping)
        and isinstance(tree.get("param_groups"), list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in tree["param_groups"])
    )


def check_optimizer(optimizer: torch.optim.Optimizer, where: str) -> None:
    """Raise UnsupportedValueError, which names `where`, if the optimizer has state that has no name."""
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise UnsupportedValueError(
            f"state[{where!r}] is a ZeroRedundancyOptimizer, whose state is nowhere complete: each rank "
            "has that of some parameters. Shard the model and its optimizer with "
            "torch.distributed.fsdp.fully_shard, or use the plain optimizer."
        )
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    stale = sum(
        isinstance(key, torch.Tensor) and id(key) not in own for key in getattr(optimizer, "state", ())
    )
    if stale:
        raise UnsupportedValueError(
            f"state[{where!r}], a {type(optimizer).__qualname__}, has state of {stale} parameters that are in "
            "none of its groups: the model's parameters were replaced after the optimizer had made state for "
            "them. Make the optimizer from the parameters that the model has now, after it is wrapped, sharded "
            "or converted."
        )

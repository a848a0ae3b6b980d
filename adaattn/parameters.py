"""Find which modules hold which weights, before conversion or calibration changes any."""

from __future__ import annotations

from torch import nn


def parameter_owners(model: nn.Module) -> dict[int, set[str]]:
    """Return for each parameter's address the names of the modules that hold it; several where it is tied."""
    found: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(address(parameter), set()).add(name)
    return found


def address(parameter: nn.Parameter) -> int:
    """Return the address of a tensor's numbers, which two parameters may share; without storage it is unique."""
    return (parameter.data_ptr() if type(parameter) is nn.Parameter else 0) or -id(parameter)


def have_plain_parameters(module: nn.Module) -> bool:
    """Return whether all its weights are ordinary tensors, not quantised or sharded tensors of another class."""
    return all(type(parameter) is nn.Parameter for parameter in module.parameters())

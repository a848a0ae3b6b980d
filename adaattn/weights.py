"""Who holds which weights: what conversion and calibration look at before they change any."""

from __future__ import annotations

from torch import nn


def owners(model: nn.Module) -> dict[nn.Parameter, set[str]]:
    """The names of the modules that hold a parameter themselves; several, where weights are tied."""
    found: dict[nn.Parameter, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(parameter, set()).add(name)
    return found


def are_plain(module: nn.Module) -> bool:
    """Whether all its weights are ordinary tensors, not quantised or sharded ones of a type of their own."""
    return all(type(parameter) is nn.Parameter for parameter in module.parameters())

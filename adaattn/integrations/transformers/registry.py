"""Know which models of transformers attend through adaattn, and with which tolerance."""

from __future__ import annotations

from typing import Any

from torch import nn

from adaattn.planning.budget import Budget

SETTING = "adaattn_tolerance"  # in a model's config; save_pretrained writes it, from_pretrained reads it

registered: dict[str, Budget] = {}


def configs_of(model: nn.Module) -> list[Any]:
    """Return the configs, of a model and of its parts, that ask for a registered implementation."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) in registered]


def takes_implementations(module: nn.Module) -> bool:
    """Return whether a model of transformers dispatches through AttentionInterface."""
    if not is_model(module):
        return True
    try:
        return bool(module._can_set_attn_implementation())  # type: ignore[operator]
    except (AttributeError, OSError):  # it reads the model's source, which a class of a shell has not
        return True


def is_model(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def tolerance_of(module: nn.Module) -> float | None:
    """Return the tolerance that a module of transformers attends with; None where another implementation attends."""
    config = getattr(module, "config", None)
    budget = registered.get(getattr(config, "_attn_implementation", None) or "")
    return None if budget is None else float(getattr(config, SETTING, budget.tolerance))

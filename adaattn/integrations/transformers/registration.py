"""Register the attention with transformers, and set the tolerance of one model."""

from __future__ import annotations

import functools

from torch import nn

from adaattn.calibration.projections import register_matcher
from adaattn.checks import as_int, check_instance, described
from adaattn.errors import ConfigError
from adaattn.integrations.transformers.attention import DENSE_BELOW, attend, attention_mask
from adaattn.integrations.transformers.calibration import match_attention
from adaattn.integrations.transformers.registry import (
    SETTING,
    configs_of,
    is_model,
    registered,
    takes_implementations,
    tolerance_of,
)
from adaattn.planning.budget import POLICIES, Budget, as_tolerance
from adaattn.planning.precision import PRECISIONS


def register(
    tolerance: float = POLICIES["balanced"],
    *,
    safety: float = Budget.safety,
    precisions: tuple[str, ...] = PRECISIONS,
    low_rank: bool = True,
    dense_below: int = DENSE_BELOW,
    name: str = "adaattn",
) -> None:
    """Teach transformers an attention implementation; registering a name again replaces it.

    Args:
        tolerance: accepted relative error (root mean square) of the attention output of a head; `set_tolerance`
            changes it for one model.
        safety, precisions, low_rank: see `adaattn.planning.budget.Budget`.
        dense_below: fewer queries than this, over more keys than queries, take transformers' own `sdpa`: decode steps
            over a cache. 0 never does. Exported programs never do, nor the eager runs that verify them, and dropout
            always does.
        name: what models ask for; it begins with "adaattn".

    Example:
        >>> register(tolerance=1e-2)
        >>> model = transformers.AutoModel.from_config(config, attn_implementation="adaattn")

    Raises:
        ConfigError: an option out of range, or transformers missing or too old. Later, from a model's forward: an
            option of its attention that AdaAttn does not have.
    """
    budget = Budget(tolerance, safety, precisions, low_rank)
    dense_below = as_int("dense_below", dense_below, "a number of queries, 0 for never", least=0)
    if not isinstance(name, str) or not name.startswith("adaattn") or not name.replace("-", "_").isidentifier():
        # Transformers reads meaning into names: "a/b" is downloaded, "flash…" and "sdpa…" are its own.
        raise ConfigError(f"name is {described(name)}; give letters, digits, - and _ that begin with adaattn")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ConfigError("transformers is missing or too old: pip install 'adaattn[transformers]'") from error

    register_calibration()
    AttentionInterface.register(name, functools.partial(attend, budget, dense_below, sdpa_attention_forward))
    AttentionMaskInterface.register(name, functools.partial(attention_mask, sdpa_mask))
    registered[name] = budget


def register_calibration() -> None:
    """Let `adaattn.calibrate` find the attention of models of transformers, whatever implementation computes it.

    Raises:
        ImportError: transformers is missing.
    """
    import transformers  # noqa: F401

    register_matcher(match_attention)


def set_tolerance(model: nn.Module, tolerance: float) -> None:
    """Change the tolerance of one model, as `adaattn_tolerance` of its config.

    Models that were made from one config object share it. `save_pretrained` keeps it.

    Raises:
        ConfigError: the tolerance is out of range, or the model does not attend by `register`'s implementation.
    """
    tolerance = as_tolerance(tolerance)
    check_instance("model", model, nn.Module, "a model of transformers")
    configs = configs_of(model)
    attending = [module for module in model.modules() if tolerance_of(module) is not None]
    alone = [type(module).__name__ for module in attending if not takes_implementations(module)]
    if alone and not any(is_model(module) and takes_implementations(module) for module in attending):
        raise ConfigError(
            f"{alone[0]} does not dispatch through transformers' AttentionInterface: a tolerance changes nothing in it"
        )
    if not configs:
        names = " or ".join(map(repr, registered)) or "'adaattn', after register()"
        raise ConfigError(
            f"{type(model).__name__} has no adaptive attention; give it attn_implementation={names} in from_pretrained "
            "or by model.set_attn_implementation"
        )
    for config in configs:
        setattr(config, SETTING, tolerance)

"""`attn_implementation="adaattn"`: models of Hugging Face transformers that attend within an error budget.

Transformers calls one function for the attention of all its models, and another for their masks; `register` adds ours
under a name. Nothing here imports transformers before that.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.checks import as_int, check_instance, described
from adaattn.errors import ConfigError
from adaattn.functional import adaptive_attention, chooses_as_exported
from adaattn.planning.budget import POLICIES, Budget
from adaattn.planning.precision import PRECISIONS

SETTING = "adaattn_tolerance"  # in a model's config; save_pretrained writes it, from_pretrained reads it
# So many queries share one read of the keys and values in the fused kernels. Fewer are bound by that read, which
# adaptive attention does twice: once for its statistics. So it cannot win there, whatever it saves in products.
DENSE_BELOW = 64

REFUSED = {
    "softcap": "a cap on the scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "sinks": "attention sinks",
    "head_mask": "head_mask",
    "output_attentions": "output_attentions: fused attention has no weights to show",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens_q)",
    "cu_seq_lens_k": "packed sequences (cu_seq_lens_k)",
    "indices": "keys chosen by an index (indices)",
    "block_indices": "keys chosen by an index (block_indices)",
    "sliding_window": "a window of keys (sliding_window) without a mask that says so",
}

_registered: dict[str, Budget] = {}
_checked: set[type] = set()  # configs whose models' code calls us


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
            option of its attention that ours does not have.
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
    from adaattn.calibration.projections import register_finder
    from adaattn.integrations.transformers_pairs import find  # stands on this module

    if not _registered:
        register_finder(find)
    AttentionInterface.register(name, functools.partial(_attend, budget, dense_below, sdpa_attention_forward))
    AttentionMaskInterface.register(name, functools.partial(_mask, sdpa_mask))
    _registered[name] = budget


def set_tolerance(model: nn.Module, tolerance: float) -> None:
    """Change the tolerance of one model, as `adaattn_tolerance` of its config.

    Models that were made from one config object share it. `save_pretrained` keeps it.

    Raises:
        ConfigError: the tolerance is out of range, or the model does not attend by `register`'s implementation.
    """
    tolerance = Budget(tolerance).tolerance  # refuses what is out of range
    check_instance("model", model, nn.Module, "a model of transformers")
    configs = configs_of(model)
    attending = [module for module in model.modules() if tolerance_of(module) is not None]
    alone = [type(module).__name__ for module in attending if not takes_implementations(module)]
    if alone and not any(_is_model(module) and takes_implementations(module) for module in attending):
        raise ConfigError(
            f"{alone[0]} computes attention by itself and calls no other: a tolerance changes nothing in it"
        )
    if not configs:
        names = " or ".join(map(repr, _registered)) or "'adaattn', after register()"
        raise ConfigError(
            f"{type(model).__name__} has no adaptive attention; give it attn_implementation={names}, at its making or "
            "by model.set_attn_implementation"
        )
    for config in configs:
        setattr(config, SETTING, tolerance)


def configs_of(model: nn.Module) -> list[Any]:
    """The configs, of a model and of its parts, that ask for an implementation of ours."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) in _registered]


def takes_implementations(module: nn.Module) -> bool:
    """Whether a model of transformers calls the attention that its config names; some compute it by themselves."""
    if not _is_model(module):
        return True
    try:
        return bool(module._can_set_attn_implementation())  # type: ignore[operator]
    except (AttributeError, OSError):  # it reads the model's source, which a class of a shell has not
        return True


def _is_model(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def tolerance_of(module: nn.Module) -> float | None:
    """The tolerance that a module of transformers attends with; None where it does not attend by us."""
    config = getattr(module, "config", None)
    budget = _registered.get(getattr(config, "_attn_implementation", None) or "")
    return None if budget is None else float(getattr(config, SETTING, budget.tolerance))


def _mask(sdpa_mask: Any, *arguments: Any, **options: Any) -> Tensor | None:
    """The mask of transformers' `sdpa`: boolean, of causality, windows and padding alike.

    In eager mode there is none where nothing is padded and `is_causal` says it all; a program always has one.
    """
    config = type(options.get("config"))
    if config not in _checked and not torch.compiler.is_dynamo_compiling():
        _check_code(config)
        _checked.add(config)
    mask: Tensor | None = sdpa_mask(*arguments, **options)
    return mask


def _check_code(config: type) -> None:
    """Raises ConfigError where a model computes attention by itself: it would take our mask and never call us.

    Transformers asks no model whether its code calls the registered function. Its own test, before an implementation is
    changed, is to look for the call beside the attention classes, as here.
    """
    package = config.__module__.rpartition(".")[0]
    for name, code in list(sys.modules.items()):
        if not name.startswith(f"{package}.modeling_") or hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
            continue
        own = [cls for cls in vars(code).values() if isinstance(cls, type) and cls.__module__ == name]
        if any("Attention" in cls.__name__ and cls.__base__ is nn.Module for cls in own):
            raise ConfigError(
                f"{name.rpartition('.')[2]} of this transformers computes attention by itself and calls no other; use "
                'attn_implementation="eager" for its models, or a newer transformers'
            )


def _attend(
    budget: Budget,
    dense_below: int,
    dense: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q (B, H, Sq, D), k and v (B, Hk, Sk, D) to (B, Sq, H, D), and no weights.

    A mask says all; without one, `is_causal` does.
    """
    # The sizes of a program are symbols: a question about them would become a guard.
    sizes = None if torch.compiler.is_exporting() else (query.shape[2], key.shape[2])
    window = options.pop("sliding_window", None)
    if window is not None and attention_mask is None and (sizes is None or sizes[1] > window):
        options["sliding_window"] = window  # else the mask shows it, or it shows all keys
    _refuse(module, options)
    short = sizes is not None and not chooses_as_exported() and sizes[0] < min(dense_below, sizes[1])
    if dropout > 0 or short:
        operands = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
        return dense(*operands, position_bias=position_bias, **options)[0], None
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(is_causal) and attention_mask is None
    if is_causal and sizes is not None and sizes[0] < sizes[1]:
        if sizes[0] == 1:  # the newest token sees all before it
            is_causal = False
        else:  # a prompt in a static cache, whose end is still empty
            key, value = key[:, :, : sizes[0]], value[:, :, : sizes[0]]
            position_bias = None if position_bias is None else position_bias[..., : sizes[0]]
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embedding leaves q and k in float32
        low = torch.get_autocast_dtype(device)
        query, key, value = (x.to(low) if x.dtype == torch.float32 else x for x in (query, key, value))
    output = adaptive_attention(
        query,
        key,
        value,
        _biased(attention_mask, position_bias),
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=True,
        tolerance=getattr(module.config, SETTING, budget.tolerance),
        safety=budget.safety,
        precisions=budget.precisions,
        low_rank=budget.low_rank,
    )
    return output.transpose(1, 2).contiguous(), None


def _biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The mask with a bias on the scores, as of T5, in it."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _refuse(module: nn.Module, options: dict[str, Any]) -> None:
    """Raises ConfigError for what the model wants and we have not."""
    options = {"output_attentions": getattr(module.config, "output_attentions", False)} | options
    given = {name for name, option in options.items() if option is not None and option is not False}
    wanted = [reason for name, reason in REFUSED.items() if name in given]
    if wanted:
        raise ConfigError(
            f"{type(module).__name__} asks for {wanted[0]}, which adaptive attention does not have; use "
            'attn_implementation="eager" for this model, or leave the option out'
        )

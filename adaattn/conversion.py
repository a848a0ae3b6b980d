"""Replace `torch.nn.MultiheadAttention` by AdaAttn modules; weights are copied exactly.

What cannot be carried over without changing results is left as it is, and the reason is given.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from adaattn.attention.base import AttentionBase
from adaattn.attention.kinds import ATTENTION
from adaattn.attention.torch_multihead import MultiheadAttention
from adaattn.checks import as_choice, check_instance
from adaattn.errors import ConfigError
from adaattn.parameters import address, have_plain_parameters, parameter_owners
from adaattn.planning.budget import POLICIES, Budget, resolve_tolerance
from adaattn.planning.precision import PRECISIONS

# What attention is made of in the code of a forward: a call, or two products around a softmax.
CALL = re.compile(r"scaled_dot_product_attention|multi_head_attention_forward|flex_attention|flash_attn")
PRODUCT = re.compile(r"(?<=[\w)\]])\s*@|\b(?:matmul|bmm|baddbmm|einsum)\(")


@dataclass(frozen=True)
class Conversion:
    """What attention becomes.

    Args:
        kind: "adaptive", "adaptive_precision", "adaptive_rank" or "dense".
        tolerance, policy: as in `AdaptiveAttention`; without either "balanced". "dense" takes none.
        safety: as in `AdaptiveAttention`.
        precisions: those the target allows, for "adaptive" and "adaptive_precision".

    Example:
        >>> Conversion("adaptive_precision", tolerance=1e-3, precisions=("fp32", "fp16")).kind
        'adaptive_precision'

    Raises:
        ConfigError: a value out of range, or one that this kind does not use.
    """

    kind: str = "adaptive"
    tolerance: float | None = None
    policy: str | None = None
    safety: float = Budget.safety
    precisions: tuple[str, ...] = PRECISIONS

    def __post_init__(self) -> None:
        as_choice("kind", self.kind, ATTENTION)
        accepted = resolve_tolerance(self.tolerance, self.policy)
        budget = Budget(POLICIES["balanced"] if accepted is None else accepted, self.safety, self.precisions)
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", budget.tolerance)
        object.__setattr__(self, "safety", budget.safety)
        object.__setattr__(self, "precisions", budget.precisions)
        if self.kind in ("dense", "adaptive_rank") and self.precisions != PRECISIONS:
            raise ConfigError(f"{self.kind!r} keeps the precision of its inputs; leave precisions out")
        if self.kind == "dense" and (accepted is not None or self.safety != Budget.safety):
            raise ConfigError("'dense' approximates nothing; leave tolerance, policy and safety out")

    def options(self) -> dict[str, Any]:
        """Return the arguments of the module's constructor that this asks for."""
        if self.kind == "dense":
            return {}
        policy = "balanced" if self.tolerance is None and self.policy is None else self.policy
        options: dict[str, Any] = {"tolerance": self.tolerance, "policy": policy, "safety": self.safety}
        return options if self.kind == "adaptive_rank" else options | {"precisions": self.precisions}


@dataclass(frozen=True)
class Converted:
    """One attention of a model: its name, and the reason why it was left as it is, or None where it was replaced."""

    name: str
    reason: str | None = None


def convert(model: nn.Module, config: Conversion | None = None) -> list[Converted]:
    """Replace, in place, every `torch.nn.MultiheadAttention` within a model by attention of this package.

    Layers of `torch.nn.Transformer…` are included; their fused kernels, which would call no module, stay off from then
    on. Results agree with torch's to rounding, apart from what the tolerance allows, with two exceptions: a query that
    may attend to nothing gets zeros instead of NaN, and what `torch.nn.TransformerEncoder` returns at padded tokens is
    no longer zero in evaluation but what it is in training.

    Args:
        model: any module; its weights are carried over with their type, device and `requires_grad`.
        config: what attention becomes; `Conversion()` by default.

    Returns:
        A record of each attention, in the model's order; also of modules that are no `torch.nn.MultiheadAttention` but
        look like attention, by their name or by the code of their forward. These are left as they are.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> convert(layer, Conversion(tolerance=1e-2))
        [Converted(name='self_attn', reason=None)]

    Warns:
        UserWarning: nothing was replaced, or a module that looks like attention was left.

    Raises:
        ConfigError: an argument of another class, or the model is itself a `torch.nn.MultiheadAttention`, which has no
            parent to be replaced in; use `replacement`.
    """
    config = Conversion() if config is None else config
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    check_instance("config", config, Conversion, "an adaattn.Conversion")
    if isinstance(model, nn.MultiheadAttention):
        raise ConfigError(
            "the model is itself a torch.nn.MultiheadAttention and cannot be replaced within itself; use "
            "model = adaattn.conversion.replacement(model, config)"
        )
    holders, handwritten = parameter_owners(model), _handwritten(model)
    records, made = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = refusal(module)
            others = {holder for p in module.parameters() for holder in holders[address(p)]} - {
                name,
                f"{name}.out_proj",
            }
            if reason is None and others:
                reason = f"it shares weights with {', '.join(sorted(others))}"
            if reason is None:
                made[module] = replacement(module, config)
            records.append(Converted(name, reason))
        elif name in handwritten:
            records.append(Converted(name, f"{type(module).__name__} is not a torch.nn.MultiheadAttention"))
    complaint = _complaint(model, records, handwritten)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, made[module])
    for encoder in model.modules():
        # Torch decides on nested tensors when it builds an encoder, from the layers of then.
        converted = any(isinstance(module, MultiheadAttention) for module in encoder.modules())
        if isinstance(encoder, nn.TransformerEncoder) and converted:
            encoder.use_nested_tensor = False
    if complaint is not None:
        warnings.warn(complaint, stacklevel=2)
    return records


def _handwritten(model: nn.Module) -> set[str]:
    """Return the names of the innermost modules that look like attention and that `convert` does not know."""
    looks = dict[type, bool]()
    found, inner = set[str](), set[str]()  # inner: names of modules that have attention within
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if isinstance(module, (nn.MultiheadAttention, AttentionBase)):
            inner.update(_parents(name))
        elif kind.__module__.split(".")[0] not in ("torch", "adaattn"):
            if kind not in looks:
                looks[kind] = _looks_like_attention(module)
            if looks[kind]:
                found.add(name)
                inner.update(_parents(name))
    return found - inner


def _parents(name: str) -> list[str]:
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts))]


def _looks_like_attention(module: nn.Module) -> bool:
    if (
        re.search("attention|attn", type(module).__name__, re.IGNORECASE)
        and next(module.parameters(), None) is not None
    ):
        return True
    try:
        code = inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # a class that was typed into a shell, or no Python
        return False
    return bool(CALL.search(code)) or ("softmax" in code and len(PRODUCT.findall(code)) >= 2)


def _complaint(model: nn.Module, records: Sequence[Converted], handwritten: Collection[str]) -> str | None:
    """Return what to warn of: nothing was replaced, or attention that `convert` does not know was left."""
    left = [record for record in records if record.name in handwritten]
    if left:
        kinds = Counter(type(model.get_submodule(record.name)).__name__ for record in left)
        shown = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(5))
        advice = "call adaattn.adaptive_attention in its forward"
        if any(hasattr(module, "set_attn_implementation") for module in model.modules()):
            advice = (
                'use adaattn.integrations.transformers.registration.register() and set_attn_implementation("adaattn")'
            )
        return f"convert left what looks like attention and is not a torch.nn.MultiheadAttention: {shown}; {advice}"
    if any(record.reason is None for record in records):
        return None
    if records:
        return f"convert replaced nothing in {type(model).__name__}: {records[0].name}: {records[0].reason}"
    if any(isinstance(module, AttentionBase) for module in model.modules()):
        return None
    return f"convert found no attention in {type(model).__name__}; it replaces torch.nn.MultiheadAttention"


def replacement(attention: nn.MultiheadAttention, config: Conversion | None = None) -> MultiheadAttention:
    """Return attention of this package with the call and the weights of a `torch.nn.MultiheadAttention`.

    Example:
        >>> layer = replacement(torch.nn.MultiheadAttention(64, 4))
        >>> x = torch.randn(10, 2, 64)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([10, 2, 64])

    Raises:
        ConfigError: it uses a feature that AdaAttn lacks; the message names it.
    """
    config = Conversion() if config is None else config
    check_instance("attention", attention, nn.MultiheadAttention, "a torch.nn.MultiheadAttention")
    check_instance("config", config, Conversion, "an adaattn.Conversion")
    reason = refusal(attention)
    if reason is not None:
        raise ConfigError(f"this attention cannot be replaced: {reason}")
    weights = _split_weights(attention)
    kdim, vdim = weights["k_proj.weight"].shape[1], weights["v_proj.weight"].shape[1]
    with torch.random.fork_rng(devices=[]):  # the first weights are random, and not kept
        replaced: AttentionBase = ATTENTION[config.kind](
            attention.embed_dim,
            attention.num_heads,
            dropout=attention.dropout,
            bias=attention.in_proj_bias is not None,
            kdim=None if kdim == attention.embed_dim else kdim,
            vdim=None if vdim == attention.embed_dim else vdim,
            **config.options(),
        )
    replaced.to(attention.out_proj.weight.device)
    for name, weight in weights.items():
        projection, _, kind = name.partition(".")
        copy = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(replaced.get_submodule(projection), kind, copy)
    return MultiheadAttention(replaced, attention.batch_first).train(attention.training)


def refusal(attention: nn.MultiheadAttention) -> str | None:
    """Return why an attention cannot be replaced without changing what it computes; None if it can."""
    out = attention.out_proj
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if type(attention).forward is not nn.MultiheadAttention.forward or "forward" in vars(attention):
        return f"{type(attention).__name__} overrides forward"
    if parametrize.is_parametrized(attention) or parametrize.is_parametrized(out):
        return "its weights are parametrized; remove that first"
    if [name for name, _ in attention.named_children()] != ["out_proj"]:
        return f"{type(attention).__name__} has modules beside torch's"
    if any(getattr(module, name) for module in (attention, out) for name in hooks):
        return "it has hooks, which would be lost; remove them first"
    if type(out) not in (nn.Linear, NonDynamicallyQuantizableLinear) or not have_plain_parameters(attention):
        return "its weights are quantised, or otherwise no plain tensors"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "add_bias_kv adds a key that no input makes"
    if attention.add_zero_attn:
        return "add_zero_attn adds a key of zeros"
    if attention.embed_dim != attention.num_heads * attention.head_dim:
        return f"embed_dim {attention.embed_dim} is not {attention.num_heads} heads of {attention.head_dim}"
    if (attention.in_proj_bias is None) != (out.bias is None):
        return "only some of its projections have a bias"
    if not 0 <= attention.dropout < 1:
        return f"its dropout is {attention.dropout}, which leaves nothing"
    return None


def _split_weights(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    """Return the weights by their names in AdaAttn's modules; parts of in_proj are views of it."""
    packed = attention.in_proj_weight
    names = ("q_proj", "k_proj", "v_proj")
    weights: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        weights[f"{name}.weight"] = getattr(attention, f"{name}_weight") if packed is None else packed.chunk(3)[i]
        if attention.in_proj_bias is not None:
            weights[f"{name}.bias"] = attention.in_proj_bias.chunk(3)[i]
    return weights | {f"out_proj.{name}": weight for name, weight in attention.out_proj.named_parameters()}

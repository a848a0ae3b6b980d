"""Find the query and key projections that calibration may change, in this package and by registered matchers.

An integration describes the attention of another library by `QueryKeyProjections` and registers a matcher for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adaattn.attention.adaptive_rank import AdaptiveRankAttention
from adaattn.attention.base import AttentionBase, PlannedAttention
from adaattn.errors import ConfigError
from adaattn.masks import attended_keys, expand_mask
from adaattn.parameters import address, have_plain_parameters, parameter_owners

Attended = Callable[[Mapping[str, Any], int, int, int], Tensor | None]


@dataclass(frozen=True, eq=False)
class QueryKeyProjections:
    """The query and key projections of one attention, whose products alone its scores are made of.

    Nothing may come between projections and scores that does not commute with a linear map of a head's dimensions, as
    rotary embedding does not, and nothing else may be made of queries or keys: `calibrate` tries each pair first.

    Args:
        module: a call of it is one attention, in which it calls `query` and `key`.
        query: output (batch, queries, num_heads·head_dim).
        key: output (batch, keys, num_kv_heads·head_dim).
        num_heads, num_kv_heads, head_dim: query head h uses key head h // (num_heads / num_kv_heads).
        scale: of the softmax.
        attended: from the arguments of the module's call by name, batch, queries and keys, which keys any query attends
            to: boolean (batch or 1, num_kv_heads or 1, keys), or None for all.

    Raises:
        ConfigError: sizes that do not go together.
    """

    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    attended: Attended

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        for name, linear, heads in (("query", self.query, self.num_heads), ("key", self.key, self.num_kv_heads)):
            if linear.out_features != heads * self.head_dim:
                raise ConfigError(
                    f"{name} has {linear.out_features} features; expected {heads} heads of {self.head_dim}"
                )


AttentionMatcher = Callable[[nn.Module], QueryKeyProjections | str | None]
"""The pair of a module, or the reason why it cannot be calibrated, or None for a module that is not attention."""


def match_adaattn(module: nn.Module) -> QueryKeyProjections | str | None:
    """Match the modules of this package."""
    if not isinstance(module, AttentionBase):
        return None
    if not isinstance(module, PlannedAttention) or not module.low_rank:
        return "it never cuts the rank, so no basis makes it cheaper"
    if isinstance(module, AdaptiveRankAttention) and module.rank_estimation_method == "random":
        return "it rotates queries and keys at random after their projections"
    heads, kv_heads = module.num_heads, module.num_kv_heads or module.num_heads

    def attended(arguments: Mapping[str, Any], batch: int, queries: int, keys: int) -> Tensor | None:
        mask = arguments.get("attention_mask")
        return None if mask is None else attended_keys(expand_mask(mask, batch, heads, queries, keys), kv_heads)

    return QueryKeyProjections(
        module, module.q_proj, module.k_proj, heads, kv_heads, module.head_dim, module.scale, attended
    )


_matchers: list[AttentionMatcher] = [match_adaattn]


def register_matcher(matcher: AttentionMatcher) -> None:
    """Let `calibrate` find attentions of another kind; those of this package are looked for first.

    Example:
        >>> register_matcher(lambda module: "it is rotary" if type(module).__name__ == "LlamaAttention" else None)
    """
    if matcher not in _matchers:
        _matchers.append(matcher)


def find_projections(model: nn.Module) -> dict[str, QueryKeyProjections | str]:
    """Return for each attention in a model, by name, its projections or the reason why it cannot be calibrated.

    Example:
        >>> pairs(torch.nn.Sequential(DenseAttention(64, 4)))
        {'0': 'it never cuts the rank, so no basis makes it cheaper'}
    """
    found: dict[str, QueryKeyProjections | str] = {}
    for name, module in model.named_modules():
        answers = (matcher(module) for matcher in _matchers)
        answer = next((answer for answer in answers if answer is not None), None)
        if answer is not None:
            found[name] = answer
    holders = parameter_owners(model)
    uses = Counter(
        weight for pair in found.values() if isinstance(pair, QueryKeyProjections) for weight in _weights(pair)
    )
    for name, pair in found.items():
        if isinstance(pair, str):
            continue
        if any(type(linear) is not nn.Linear or not _is_plain(linear) for linear in (pair.query, pair.key)):
            found[name] = "its projections are parametrized, quantised, or otherwise no plain torch.nn.Linear"
        elif any(uses[weight] > 1 or len(holders.get(weight, "")) > 1 for weight in _weights(pair)):
            found[name] = "it shares the weights of its projections with others"
    return found


def _weights(pair: QueryKeyProjections) -> list[int]:
    return [address(weight) for linear in (pair.query, pair.key) for weight in linear.parameters()]


def _is_plain(linear: nn.Linear) -> bool:
    """Return whether what it computes is made of its weight and bias, and these are what it holds."""
    names = {name for name, _ in linear.named_parameters()}
    return have_plain_parameters(linear) and names <= {"weight", "bias"} and "forward" not in vars(linear)

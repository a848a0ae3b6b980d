"""The cases of the parity suite, as data: which graphs there are, and on which inputs each is run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import adaattn

WIDTH, HEADS = 32, 4
Shape = tuple[int, int, int]  # batch, queries, keys

# Name: the class, and what makes its plan. Fixed precisions and ranks are the rows and cuts that a plan may choose.
PLANS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dense": (adaattn.DenseAttention, {}),
    **{
        f"fixed {name}": (adaattn.AdaptivePrecisionAttention, {"default_precision": name})
        for name in ("fp32", "bf16", "fp16", "int8", "int8_fp8")
    },
    "precision by tolerance": (adaattn.AdaptivePrecisionAttention, {"tolerance": 1e-2}),
    **{
        f"fixed rank {rank}": (
            adaattn.AdaptiveRankAttention,
            {"rank_estimation_method": "random", "rank_ratio": rank * HEADS / WIDTH},
        )
        for rank in (1, 4, 8)
    },
    **{
        f"rank by {method}": (adaattn.AdaptiveRankAttention, {"rank_estimation_method": method})
        for method in ("entropy", "power")
    },
    "rank by tolerance": (adaattn.AdaptiveRankAttention, {"tolerance": 1e-2}),
    "both by tolerance": (adaattn.AdaptiveAttention, {"tolerance": 1e-2}),
    "both, tight": (adaattn.AdaptiveAttention, {"tolerance": 1e-4}),
}
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("self", "cross", "grouped")  # grouped: two heads share keys and values
MASKS = ("none", "padding", "per query", "additive", "empty rows")
# 1 token, odd, long; batches of one and of many. Cross-attention takes as many keys as KEYS says.
SHAPES: tuple[tuple[int, int], ...] = ((1, 1), (2, 17), (1, 65), (3, 130))
KEYS = {1: 5, 17: 9, 65: 130, 130: 65}


@dataclass(frozen=True)
class Graph:
    """What is exported: one file serves all shapes and distributions."""

    plan: str
    dtype: str
    kind: str
    causal: bool
    mask: str

    def __str__(self) -> str:
        return ", ".join(
            "causal" if name == "causal" else str(value)
            for name, value in ((x.name, getattr(self, x.name)) for x in fields(self))
            if value not in (False, "none")
        )

    def module(self) -> nn.Module:
        torch.manual_seed(5)
        kind, options = PLANS[self.plan]
        kv_heads = {"num_kv_heads": HEADS // 2} if self.kind == "grouped" else {}
        return kind(WIDTH, HEADS, causal=self.causal, **options, **kv_heads).eval()

    def inputs(self) -> dict[str, str]:
        tokens = "K" if self.kind == "cross" else "S"
        found = {"query": f"B,S,{WIDTH}", "key": f"B,{tokens},{WIDTH}", "value": f"B,{tokens},{WIDTH}"}
        masks = {"padding": f"B,{tokens}:bool", "per query": f"B,S,{tokens}:bool", "additive": f"B,{HEADS},S,{tokens}"}
        mask = masks.get("per query" if self.mask == "empty rows" else self.mask)
        return found if mask is None else {**found, "attention_mask": mask}


GRAPHS = [Graph(*values) for values in product(PLANS, DTYPES, KINDS, (False, True), MASKS)]


def some(count: int, dtypes: Sequence[str] = DTYPES, seed: int = 1) -> list[Graph]:
    """Return a seeded subset in which every plan, type, kind and mask comes up about equally often."""
    generator = random.Random(seed)
    names = [list(values) for values in (PLANS, dtypes, KINDS, (False, True), MASKS)]
    decks: list[list[Any]] = [[] for _ in names]
    found: list[Graph] = []
    while len(found) < count:
        for deck, values in zip(decks, names, strict=True):
            if not deck:
                deck.extend(generator.sample(values, len(values)))
        found.append(Graph(*(deck.pop() for deck in decks)))
    return found


def _outliers(x: Tensor) -> Tensor:
    return x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 1e-3)  # N(0,1) + N(0,100)·Bernoulli(0.001)


# What a projection sees; 4 and 3 make scores that a few keys win. Huge and tiny stay within float16.
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "outliers": _outliers,
    "peaked": lambda x: 4 * x,
    "biased": lambda x: x + 3 * torch.randn_like(x[:, :1]),
    "tiny": lambda x: 1e-4 * x,
    "huge": lambda x: 1e3 * x,
    "constant": lambda x: torch.full_like(x, 0.7),
}


def cases(graph: Graph, all_shapes: bool = True) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Named inputs of a graph, in its type: each distribution in all shapes, or in a seeded one."""
    generator = random.Random(str(graph))
    shapes = {name: SHAPES if all_shapes else (generator.choice(SHAPES),) for name in DISTRIBUTIONS}
    for (batch, queries), (name, make) in product(SHAPES, DISTRIBUTIONS.items()):
        if (batch, queries) not in shapes[name]:
            continue
        torch.manual_seed(1000 * queries + len(name))
        keys = KEYS[queries] if graph.kind == "cross" else queries
        q = make(torch.randn(batch, queries, WIDTH))
        k = make(torch.randn(batch, keys, WIDTH)) if graph.kind == "cross" else q
        inputs = {"query": q, "key": k, "value": k}
        inputs = {key: x.to(getattr(torch, graph.dtype)) for key, x in inputs.items()}
        mask = _mask(graph.mask, batch, queries, keys)
        if mask is not None:
            inputs["attention_mask"] = mask if mask.dtype == torch.bool else mask.to(inputs["query"].dtype)
        yield f"{name}, batch {batch}, {queries} queries, {keys} keys", inputs


def _mask(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "additive":
        mask = torch.randn(batch, HEADS, queries, keys)
        return mask.masked_fill(torch.rand(mask.shape) < 0.2, -torch.inf)
    allowed = torch.rand(batch, keys) < 0.7 if kind == "padding" else torch.rand(batch, queries, keys) < 0.6
    allowed[..., 0] = True
    if kind == "empty rows":
        allowed[:, ::3] = False
    return allowed

"""Models that do not use this project, and factories that misbehave, for `adaattn-export tests.support.models:NAME`."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import adaattn
from adaattn.encoder import Encoder


def tiny() -> Encoder:
    """Return the smallest model."""
    return Encoder(16, 2, layers=("adaptive",)).eval()


def linear() -> nn.Module:
    return nn.Linear(16, 8)


def talkative() -> nn.Module:
    print("a factory may print")
    return nn.Linear(16, 8)


def compiled() -> Any:
    return torch.compile(nn.Linear(16, 8))


def distributed() -> Any:
    return torch.compile(nn.DataParallel(on_meta()))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(16, 8)


def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


class Tagger(nn.Module):
    """Words to scores of words, by the same weights; positions from a table of 16; a mask that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.scores = nn.Embedding(100, 8), nn.Linear(8, 100, bias=False)
        self.scores.weight = self.words.weight
        self.places = nn.Parameter(torch.randn(16, 8))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(ids) + self.places[: ids.shape[1]]
        return {"scores": self.scores(x), "mask": x if mask is None else x * mask[:, :, None]}


class Functional(nn.Module):
    """Call the SDPA-like function, with other names."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return adaattn.adaptive_attention(q, k, v, is_causal=True, tolerance=1e-2)


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Next(nn.Module):
    """Wants y one longer than x."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape[1] + 1 == y.shape[1], "y is one longer than x"
        return x.sum(1) + y.sum(1)


class Pairs(nn.Module):
    """Takes even lengths alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1] // 2, 2, -1).sum(2)


class Rows(nn.Module):
    """Takes all numbers in rows of 64."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 64) * 2


class Flat(nn.Module):
    """A length of 4, of 16 channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Branch(nn.Module):
    """Control flow that hangs on numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Lookup(nn.Module):
    """Fails, whatever its inputs are."""

    def forward(self, x: Tensor) -> Tensor:
        return {"a": x}["b"]


class Dropping(nn.Module):
    """Forgets that dropout is for training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


class Halves(nn.Module):
    """As many operators as there are chunks, which hangs on the length."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([half.cumsum(1) for half in x.chunk(2, 1)], 1)


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(16, 8))


def traced() -> nn.Module:
    return torch.jit.trace(nn.Linear(16, 8), torch.ones(1, 16))


def lazy() -> nn.Module:
    return nn.LazyLinear(8)


class Options(nn.Module):
    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        return x + options["y"]


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> int:
        return len(x.shape)


class Broken(nn.Module):
    """Has weights that are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        with torch.no_grad():
            self.linear.weight[0, 0], self.linear.bias[1] = torch.nan, torch.inf

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Interrupted(nn.Module):
    """Ctrl-C comes while it runs: to all processes of the group, as from a terminal."""

    def forward(self, x: Tensor) -> Tensor:
        os.killpg(0, signal.SIGINT)
        return x + 1


class Terminated(nn.Module):
    """The system asks the process to end."""

    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return x + 1


an_instance = nn.Linear(16, 8)


def number() -> int:
    return 5


def wants_an_argument(width: int) -> nn.Module:
    return nn.Linear(width, 8)


def fails() -> NoReturn:
    raise RuntimeError("the shop is closed\nuntil Monday")


def leaves() -> NoReturn:
    raise SystemExit(3)


def lacks_something() -> NoReturn:
    raise ModuleNotFoundError("install the shop first")


def errs() -> Any:
    return (5).shape  # type: ignore[attr-defined]


def lacks_a_package() -> NoReturn:
    import no_such_package  # type: ignore[import-not-found]

    raise AssertionError(no_such_package)

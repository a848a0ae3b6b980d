"""Calibrate: choose from sample data a basis of queries and keys in which lower ranks suffice.

At full rank nothing changes but rounding, and the basis costs nothing: it folds into the weights. What it is, and the
mathematics, are in `adaattn.calibration.balancing`; which attentions it acts on, in `adaattn.calibration.projections`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.attention.base import PlannedAttention
from adaattn.calibration.balancing import SecondMoments, balance, energies, fold
from adaattn.calibration.invariance import UNTRIED, check_invariance
from adaattn.calibration.projections import QueryKeyProjections, find_projections
from adaattn.calibration.state_file import fingerprint, read, write
from adaattn.checks import as_int, as_path, check_function, check_instance, described
from adaattn.errors import ConfigError
from adaattn.planning.rank_rules import power_rank


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Energies of one attention, scale²·E[q_d²]·E[k_d²]: the score variance that each dimension of a head carries.

    A rank keeps the leading dimensions, and the energy of those that it leaves out is what the error budget pays.
    """

    before: Tensor  # (heads, head_dim), float64
    after: Tensor  # (heads, head_dim), float64, in the new basis
    tokens: int  # keys that were counted: some times head_dim are needed for a basis worth having

    def ranks(self, share: float = 0.99) -> tuple[list[int], list[int]]:
        """Return for each head the least rank that holds this share of its energy, before and after."""
        return power_rank(self.before, share).tolist(), power_rank(self.after, share).tolist()


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a calibration did."""

    batches: int
    layers: dict[str, Spectrum]  # by the attention's name
    refused: dict[str, str]  # the reason, by the name of an attention that is as it was


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 16,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Fold into a model's projections, in place, the basis in which the fewest dimensions hold the scores' energy.

    The model runs in evaluation mode and without gradients, and is then in the mode it was in; the statistics of
    adaptive modules start anew. Weights change only when all batches are done, and only of attentions whose output, at
    full rank in float64, another basis did not change.

    Args:
        model: with adaptive attention of this package, or of a kind that a matcher knows
            (`adaattn.calibration.projections`).
        batches: each a tensor, a tuple or list of arguments, or a mapping of keyword arguments of the model, on its
            device. Some thousand tokens of what the model will meet; padding that masks exclude does not count.
        resume: a file that holds the statistics so far. If it exists, as many batches as it has counted are skipped.
        save_every: write that file after so many batches, and at the end.
        on_batch: called after each batch with the number done.

    Returns:
        The energies of each attention before and after, and the reason for each that was left as it is.

    Example:
        >>> model = torch.nn.Sequential(adaattn.Encoder(64, 4, ("adaptive",)))
        >>> result = calibrate(model, [torch.randn(2, 100, 64) for _ in range(10)])
        >>> list(result.layers), result.batches
        (['0.stack.0.attention'], 10)

    Raises:
        ConfigError: no batch, or one that is none of the above; an argument of another class.
        CheckpointError: the file cannot be written or read, is damaged, or is of other weights.
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    iterable = hasattr(type(batches), "__iter__") or hasattr(type(batches), "__getitem__")
    if isinstance(batches, str) or not iterable:
        raise ConfigError(f"batches is {described(batches)}; give an iterable of batches")
    save_every = as_int("save_every", save_every, "a number of batches of at least 1")
    if resume is not None:
        resume = as_path("resume", resume)
    check_function("on_batch", on_batch)
    found = find_projections(model)
    refused = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    chosen = {name: pair for name, pair in found.items() if isinstance(pair, QueryKeyProjections)}
    sums = {name: SecondMoments.zeros(pair) for name, pair in chosen.items()}
    if not chosen:
        return Calibration(0, {}, refused)
    tried = dict[str, str | None]()  # by attention, why its basis must stay, or None
    weights = fingerprint(model) if resume is not None else ""
    done = saved = 0
    if resume is not None and resume.exists():
        done = saved = read(resume, weights, sums, tried)
    elif resume is not None:
        write(resume, done, weights, sums, tried)  # fails now rather than after all the work
    with _evaluation(model), _tried(chosen, tried, refused), _observed(chosen, sums), torch.no_grad():
        for batch in islice(batches, done, None):
            _call(model, batch)
            done += 1
            if resume is not None and done % save_every == 0:
                write(resume, done, weights, sums, tried)
                saved = done
            on_batch(done)
    if done == 0:
        raise ConfigError("there was no batch to calibrate with; give at least one")
    if resume is not None and saved != done:
        write(resume, done, weights, sums, tried)

    layers = {}
    for name, pair in chosen.items():
        moments = sums[name]
        if not moments.queries:
            refused[name] = "no batch reached it"
        elif not all(bool(x.isfinite().all()) for x in moments.state().values()):
            refused[name] = "its queries or keys are not finite"
        elif (reason := tried.get(name, refused.get(name, UNTRIED))) is not None:
            refused[name] = reason
        else:
            try:
                basis = balance(moments)
                folded = fold(pair, *basis)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                folded = False
            if not folded:
                refused[name] = "its statistics are too large to be decomposed"
                continue
            refused.pop(name, None)
            identity = torch.eye(pair.head_dim, dtype=torch.float64).expand_as(basis[0])
            before = energies(moments, pair.scale, identity, identity)
            layers[name] = Spectrum(before, energies(moments, pair.scale, *basis), int(moments.keys.min()))
    return Calibration(done, layers, refused)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping) and all(isinstance(name, str) for name in batch):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        raise ConfigError(
            f"a batch is {described(batch)}; give a tensor, a tuple or list of arguments, or a mapping of "
            "keyword arguments"
        )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    training = [module.training for module in modules]
    try:
        model.eval()
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
            if isinstance(module, PlannedAttention):
                module.reset_statistics()


@contextmanager
def _tried(
    chosen: Mapping[str, QueryKeyProjections], tried: dict[str, str | None], undecided: dict[str, str]
) -> Iterator[None]:
    """Try another basis at each call of an attention, until one decides."""

    def attempt(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in tried:
            decides, reason = check_invariance(chosen[name], args, kwargs)
            if decides:
                tried[name] = reason
            elif reason is not None:
                undecided[name] = reason

    with ExitStack() as hooks:
        for name, pair in chosen.items():
            hooks.enter_context(pair.module.register_forward_pre_hook(partial(attempt, name), with_kwargs=True))
        yield


@contextmanager
def _observed(chosen: Mapping[str, QueryKeyProjections], sums: Mapping[str, SecondMoments]) -> Iterator[None]:
    """Add what the pairs project to their sums, as long as this lasts."""
    with ExitStack() as hooks:
        for name, pair in chosen.items():
            latest: dict[str, Tensor] = {}
            for key, linear in (("q", pair.query), ("k", pair.key)):
                hooks.enter_context(linear.register_forward_hook(partial(_keep, latest, key)))
            count = partial(_count, pair, sums[name], latest, inspect.signature(pair.module.forward))
            hooks.enter_context(pair.module.register_forward_hook(count, with_kwargs=True))
        yield


def _keep(latest: dict[str, Tensor], key: str, module: nn.Module, args: Any, output: Tensor) -> None:
    latest[key] = output


def _count(
    pair: QueryKeyProjections,
    moments: SecondMoments,
    latest: dict[str, Tensor],
    signature: inspect.Signature,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    if len(latest) < 2:  # a call that attends only to keys of an earlier one has no keys to count
        latest.clear()
        return
    q, k = (latest.pop(key).unflatten(-1, (-1, pair.head_dim)).transpose(1, 2) for key in ("q", "k"))
    arguments = {**signature.bind(*args, **kwargs).arguments, **kwargs}  # also those that **kwargs of its own took in
    attended = pair.attended(arguments, q.shape[0], q.shape[2], k.shape[2])
    moments.add(q, k, None if attended is None else attended[..., -k.shape[2] :])  # a mask covers cached keys, too

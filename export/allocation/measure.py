"""Measure what a plan is chosen by: the error that each format makes at each site, and how the output answers to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from adaattn.export.allocation.arithmetic import compute, fp8_operands, mask_of, per_channel
from adaattn.export.allocation.heads import HeadStatistics
from adaattn.export.allocation.sites import Network, Site, attention_arguments
from adaattn.export.allocation.write import channel_scales
from adaattn.export.formats import FORMATS, FP8, FP32, HEADROOM, PLUGIN, rounded, scale_of
from adaattn.export.golden.plan_mode import PlanMode
from adaattn.export.rewrite.match import SDPA
from adaattn.system.atomic_file import scratch_folder

COTANGENTS = 3  # backward passes of a sample
LARGE = 1 << 24  # bytes of a tensor that waits for the backward passes on disk


@dataclass
class SiteStatistics:
    """What was measured at a site.

    Args:
        flops: operations of its products, in the largest sample.
        read, written: numbers of its operands and of its result there.
        energy: sum of the squares of its output.
        noise: for each format the sum of the squares of what it changes in the output, on exact operands.
        peak: largest number among its operands and results.
        peaks: largest number of each operand that fp8 quantizes.
        gain: sum over samples of the squared relative error of the model's output, for one of the site's.
        gains: samples in that sum.
        heads: of attention whose heads may have a plan each.
    """

    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    energy: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0
    peaks: list[float] = field(default_factory=list)
    gain: float = 0.0
    gains: int = 0
    heads: HeadStatistics = field(default_factory=HeadStatistics)

    def __post_init__(self) -> None:
        if not isinstance(self.heads, HeadStatistics):  # as JSON has it
            self.heads = HeadStatistics(**self.heads)

    def overflows(self, form: str) -> bool:
        """Return whether a format may not hold the numbers of the site."""
        return form != FP32 and self.peak * HEADROOM > FORMATS[FORMATS[form].carrier].largest

    def error(self, form: str) -> float:
        """Return the relative error that a format makes at the site; infinite where it overflows."""
        if self.overflows(form):
            return float("inf")
        return float((self.noise.get(form, 0.0) / self.energy) ** 0.5) if self.energy else 0.0

    @property
    def sensitivity(self) -> float:
        """The relative error of the model's output, over that of the site's."""
        return float((self.gain / self.gains) ** 0.5) if self.gains else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


class Measurements:
    """The statistics of all sites of a network.

    Args:
        network: whose sites are measured.
        known: statistics by the names of sites, to go on from.
    """

    def __init__(self, network: Network, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.network = network
        self.sites = {site.name: SiteStatistics(**(known or {}).get(site.name, {})) for site in network.sites.values()}
        self.sizes: dict[str, int] = {}  # of each floating-point value, in the largest sample
        self._module = network.program.graph_module

    def count(self, arguments: Sequence[Any]) -> None:
        """Count the operations of each site, and the numbers that it reads and writes, on a sample in float32."""
        statistics, sites, sizes = self.sites, self.network.sites, self.sizes

        class Counter(Interpreter):
            def run_node(self, n: Node) -> Any:
                if n not in sites:
                    result = super().run_node(n)
                    sizes[n.name] = sum(x.numel() for x in _tensors(result))
                    return result
                operands, _ = self.fetch_args_kwargs_from_env(n)
                with FlopCounterMode(display=False) as counter:
                    result = super().run_node(n)
                found = statistics[n.name]
                sizes[n.name] = result.numel()
                found.flops = float(counter.get_total_flops())
                found.read, found.written = float(sum(x.numel() for x in _tensors(operands))), float(result.numel())
                return result

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            Counter(self._module).run(*arguments, enable_io_processing=False)

    def measure_errors(self, arguments: Sequence[Any], dtype: torch.dtype, ranges_only: bool = False) -> None:
        """Compute each site at each of its formats, on its operands of a sample in float64, one site at a time.

        Args:
            dtype: of the program.
            ranges_only: note the largest numbers and leave out the rest.
        """
        owner = self

        class Errors(Interpreter):
            def run_node(self, n: Node) -> Any:
                with mode:
                    result = super().run_node(n)
                site = owner.network.sites.get(n)
                if site is not None:
                    args, kwargs = self.fetch_args_kwargs_from_env(n)
                    owner._measure(site, args, kwargs, result, ranges_only)
                return result

        mode = PlanMode(double=True, dtype=dtype)
        with torch.no_grad():
            Errors(self._module).run(*arguments, enable_io_processing=False)

    def _measure(
        self, site: Site, args: Sequence[Any], kwargs: Mapping[str, Any], exact: Tensor, ranges_only: bool
    ) -> None:
        found, node = self.sites[site.name], site.node
        mask = mask_of(node, args, kwargs)
        found.peak = max([found.peak, *(_peak(x) for x in (*_tensors((args, kwargs)), exact) if x is not mask)])
        if FP8 in site.candidates:
            peaks = [_peak(x) for x in fp8_operands(node, args, kwargs)]
            found.peaks = [max(pair) for pair in zip(peaks, found.peaks or peaks, strict=True)]
        if ranges_only:
            return
        if site.heads:
            self._measure_heads(site, args, kwargs, exact)
        known = _within_range(exact)
        found.energy += float(exact[known].square().sum())
        for form in site.candidates:
            if form == PLUGIN:
                continue
            narrow_args, narrow_kwargs = _narrow(args, kwargs, mask, FORMATS[form].carrier)
            scales = self._scales(site, narrow_args, narrow_kwargs) if form == FP8 else ()
            got = compute(_run, node, narrow_args, narrow_kwargs, form, scales, typed=False)
            noise = float((got - exact)[known].square().sum())
            found.noise[form] = found.noise.get(form, 0.0) + (noise if noise == noise else float("inf"))

    def _measure_heads(self, site: Site, args: Sequence[Any], kwargs: Mapping[str, Any], exact: Tensor) -> None:
        """Compute attention at each plan that its heads may have, all heads at one plan at a time."""
        found, mask = self.sites[site.name].heads, mask_of(site.node, args, kwargs)
        given = _narrow(args, kwargs, mask, FORMATS[PLUGIN].carrier)
        _, key, value, *_ = attention_arguments(site.node, *given)
        found.see(key, value)
        outputs = []
        for plan in site.heads:
            constants = found.planned([plan] * exact.shape[1]).tensors().values()
            outputs.append(compute(_run, site.node, *given, PLUGIN, [*constants], typed=False))
        found.add(exact, outputs)

    def _scales(self, site: Site, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Return the scales of a site's operands in one sample."""
        operands = fp8_operands(site.node, args, kwargs)
        scales = [scale_of(_peak(x)) for x in operands]
        if site.node.target is SDPA:
            return scales
        found = [operands[0].new_tensor(scale) for scale in scales]
        if per_channel(site.node) and site.node.args[1] in self.network.constants:
            found[1] = channel_scales(operands[1]).to(operands[1].dtype)
        return found

    def measure_sensitivity(self, arguments: Sequence[Any], seed: int) -> None:
        """Add the squared relative change of the model's output for one of each site's, by backward passes."""
        generator = torch.Generator().manual_seed(seed)
        sums = {site.name: 0.0 for site in self.network.sites.values()}
        squares = dict(sums)
        sites = self.network.sites
        of_heads: dict[str, Tensor] = {}  # the same for each head of an attention whose heads are planned
        squares_of_heads: dict[str, Tensor] = {}

        def add(name: str, gradient: Tensor) -> None:
            sums[name] += float(gradient.double().square().sum())
            if name in squares_of_heads:
                of_heads[name] = of_heads.get(name, 0) + gradient.double().square().sum((0, 2, 3))

        class Watching(Interpreter):
            def run_node(self, n: Node) -> Any:
                result = super().run_node(n)
                if n in sites and isinstance(result, Tensor):
                    if not result.requires_grad:
                        result = result.detach().requires_grad_()
                    numbers = result.detach().double()
                    numbers = numbers[_within_range(numbers)]
                    squares[n.name] = float(numbers.square().mean()) if numbers.numel() else 0.0
                    if sites[n].heads:
                        squares_of_heads[n.name] = result.detach().double().square().mean((0, 2, 3))
                    result.register_hook(partial(add, n.name))
                return result

        with scratch_folder() as folder, torch.enable_grad(), _on_disk(folder, arguments):
            outputs = Watching(self._module).run(*arguments, enable_io_processing=False)
            outputs = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
            for _ in range(COTANGENTS if outputs else 0):
                cotangents = [_cotangent(x.detach(), generator) for x in outputs]
                torch.autograd.backward(outputs, cotangents, retain_graph=True)
        for name, found in self.sites.items():
            found.gain += sums[name] / COTANGENTS * squares[name]
            found.gains += 1
            if name in squares_of_heads:
                gain = of_heads.get(name, torch.zeros_like(squares_of_heads[name])) / COTANGENTS
                found.heads.add_gain(gain * squares_of_heads[name])


def _narrow(
    args: Sequence[Any], kwargs: Mapping[str, Any], mask: Any, carrier: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a site with its operands, but not its mask, rounded to a format."""

    def narrow(x: Any) -> Any:
        whole = not isinstance(x, Tensor) or not x.is_floating_point() or x is mask
        return x if whole else rounded(x, carrier)

    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(narrow, (tuple(args), dict(kwargs)))
    return found


def _on_disk(folder: Path, arguments: Sequence[Any]) -> saved_tensors_hooks:
    """Return a context in which large tensors wait for a backward pass in files, but not the arguments."""
    held = {x.untyped_storage().data_ptr() for x in tree_leaves(arguments) if isinstance(x, Tensor)}
    count = itertools.count()

    def pack(x: Tensor) -> Any:
        if x.nbytes < LARGE or x.untyped_storage().data_ptr() in held:
            return x
        path = folder / str(next(count))
        x.detach().contiguous().numpy().tofile(path)
        return path, x.shape, x.detach().new_empty(0).numpy().dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        path, shape, kind = packed
        return torch.from_numpy(np.fromfile(path, kind)).reshape(shape)

    return saved_tensors_hooks(pack, unpack)


def _within_range(x: Tensor) -> Tensor:
    """Return which numbers enter an error: not those that stand for -inf, which float32 may have as such."""
    return x.abs() < FORMATS[FP32].largest / 2


def _tensors(given: Any) -> list[Tensor]:
    return [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.is_floating_point()]


def _cotangent(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return random numbers, over the size of an output: so relative errors of several outputs are one sum."""
    known = x.isfinite()
    size = x.where(known, 0).norm()
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return torch.where(known, noise, 0) / size if size else torch.zeros_like(x)


def _peak(x: Tensor) -> float:
    if not x.numel():
        return 0.0
    least, largest = map(float, x.aminmax())
    peak = max(-least, largest)
    return peak if math.isfinite(peak) else _peak(x[x.isfinite()])


def _run(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)

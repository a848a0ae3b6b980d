"""Capture a module with torch.export, with names and sizes for its dimensions."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic

import adaattn.ops  # noqa: F401  # registers the ops that a mode watches
from adaattn.attention.base import AttentionBase
from adaattn.encoder import Encoder
from adaattn.errors import ConfigError, ExportError
from adaattn.export.capture import diagnostics
from adaattn.export.capture.arguments import WithArguments
from adaattn.export.capture.captured import (
    Captured,
    check_dims,
    program_inputs,
    program_outputs,
    tensors_of,
    with_limits,
)
from adaattn.export.capture.sizes import Sizes, conditions
from adaattn.input_spec import Dimension, InputSpec, default_dimension


def default_inputs(model: nn.Module) -> tuple[InputSpec, ...]:
    """Return the inputs of a module of this package, which needs no description.

    Raises:
        ConfigError: it is another model.
    """
    if isinstance(model, (Encoder, AttentionBase)):
        return model.input_specs()
    names = ", ".join(inspect.signature(model.forward).parameters)
    raise ConfigError(
        f"the inputs of {type(model).__name__} are not described; its forward takes ({names}): describe each that you "
        'use, such as --input "x=B,S,512:float32"'
    )


def capture_module(
    model: nn.Module,
    specs: Sequence[InputSpec],
    dims: Mapping[str, Dimension],
    example: Mapping[str, Tensor] | None = None,
) -> Captured:
    """Capture a module by torch.export; what it does to itself in a call stays in copies.

    Args:
        model: in eval mode.
        specs: its inputs; dimensions named in them are dynamic.
        dims: sizes of named dimensions; those not given get `default_dimension`, narrowed to what the model takes.
        example: the user's own inputs, used to capture and to verify.

    Raises:
        ConfigError: inputs or dimensions that the model does not take.
        ExportError: torch.export cannot capture the model.
    """
    _check_names(model, specs)
    order = list(inspect.signature(model.forward).parameters)
    specs = sorted(specs, key=lambda spec: order.index(spec.name) if spec.name in order else len(order))
    used = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    check_dims(dims, used)
    sizes = {name: dims.get(name, default_dimension(name)) for name in sorted(used)}
    tracer = _Tracer(model, specs, sizes, example)
    program, taken = tracer.capture()
    inputs = program_inputs(program)
    names: dict[str, Dimension] = {}
    for spec, item in zip(specs, inputs, strict=True):
        for size, symbol in zip(spec.shape, item.shape, strict=True):
            if isinstance(size, str) and isinstance(symbol, sympy.Symbol):
                names[str(symbol)] = taken[size]
    captured = tuple(
        replace(item, below=spec.below, meaning=spec.meaning) for spec, item in zip(specs, inputs, strict=True)
    )
    captured = with_limits(captured, program, example)
    traced = {symbol: tracer.traced[dim.name] for symbol, dim in names.items()}

    tried: dict[tuple[int, ...], bool | None] = {}

    def runs(values: Mapping[str, int]) -> bool | None:
        at = tuple(values[symbol] for symbol in names)
        if at not in tried:
            sizes_at = {dim.name: values[symbol] for symbol, dim in names.items()}
            for name, (of, factor, offset) in tracer.related.items():
                sizes_at[name] = factor * sizes_at[of] + offset
            tried[at] = tracer.runs(tracer.inputs({**tracer.traced, **sizes_at}))
        return tried[at]

    asserted = conditions(program, list(names))
    found = Sizes(names, asserted, traced, runs if asserted or tracer.deferred else None)
    names = found.fitted()
    notes = [*tracer.notes]
    for dim in names.values():
        notes += diagnostics.check_fitted(dim, sizes[dim.name], dim.name in dims)
    by_name = {dim.name: dim for dim in names.values()}
    for name, (of, factor, offset) in tracer.related.items():
        ends = by_name[of].min, by_name[of].opt, by_name[of].max
        follows = Dimension(name, *(factor * size + offset for size in ends))
        if name in dims and dims[name] != follows:
            raise ConfigError(
                f"the model takes {name} from {follows.min} to {follows.max} where {of} is {by_name[of]}, not "
                f"{dims[name]}; give --dim {name}={follows}"
            )
    found = replace(found, dims=names)
    notes += found.gaps()

    def in_double() -> Callable[..., Any]:
        return _named_outputs(_copy(model, share=False).double())

    return Captured(
        type(model.model if isinstance(model, WithArguments) else model).__name__,
        program,
        _named_outputs(_copy(model)),
        in_double,
        captured,
        names,
        program_outputs(program)[0],
        example,
        found,
        notes=tuple(notes),
    )


class _Tracer:
    """torch.export on copies of a model, until it succeeds.

    `traced` are the sizes that it captured at, `related` are dimensions that follow from another one, as K: (S, 2, 1)
    where K = 2*S + 1, `deferred` says that torch did not prove that all sizes are taken, and `notes` what was left out.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[InputSpec],
        sizes: Mapping[str, Dimension],
        example: Mapping[str, Tensor] | None,
    ) -> None:
        self.model, self.specs, self.sizes, self.example = model, specs, sizes, example
        self.traced: dict[str, int] = {}
        self.related: dict[str, tuple[str, int, int]] = {}
        self.deferred = False
        self.notes: list[str] = []

    def capture(self) -> tuple[ExportedProgram, dict[str, Dimension]]:
        """Return the program, and the sizes that it may be captured for.

        What torch proves of sizes without help comes first, since it holds for all of them. Then torch defers to
        assertions what it cannot prove; and then it reads the model's bytecode, which keeps `int(x.shape[0])` dynamic.
        """
        from torch._dynamo.exc import UserError  # slow to import

        first: Exception | None = None
        for traced in _trace_sizes(self.sizes):
            self.traced, inputs = traced, self.inputs(traced)
            try:
                return self._export(inputs, self.sizes), dict(self.sizes)
            except ExportError:
                raise
            except Exception as error:  # the user's own code runs here
                if first is None:
                    first, tried = error, inputs
                if self.runs(inputs) is not False:
                    first, tried = error, inputs
                    break
        else:
            assert first is not None
            raise diagnostics.explain_capture_error(first, _copy(self.model), self.specs, tried) from first
        self.deferred = True
        for strict in (False, True):
            sizes = dict(self.sizes)
            self.related.clear()
            for _ in range(5):
                try:
                    return self._export(tried, sizes, deferred=True, strict=strict), sizes
                except ExportError:
                    raise
                except UserError as error:
                    relation = diagnostics.related(str(error))
                    if relation is not None and relation[0] not in self.related:
                        self.related[relation[0]] = relation[1:]
                        continue
                    narrower = diagnostics.narrowed(str(error), sizes)
                    if narrower == sizes or not self._within(narrower):
                        break
                    sizes = narrower
                except Exception:  # the first error says more than one of a second attempt
                    break
        if isinstance(first, UserError):
            others = [name for name in self.sizes if self._runs_elsewhere(name)]
            raise ConfigError(diagnostics.explain_dimension_error(str(first), self.sizes, others)) from first
        raise diagnostics.explain_capture_error(first, _copy(self.model), self.specs, tried) from first

    def inputs(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Return inputs of these sizes, or the user's own tensors."""
        if self.example is not None:  # copies: torch.export takes one tensor given twice for one input
            return {spec.name: self.example[spec.name].clone() for spec in self.specs}
        found = {}
        for spec in self.specs:
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            dtype = getattr(torch, spec.dtype) if spec.dtype else _model_dtype(self.model)
            ones = dtype.is_floating_point or dtype == torch.bool
            found[spec.name] = torch.ones(shape, dtype=dtype) if ones else torch.zeros(shape, dtype=dtype)
        return found

    def runs(self, inputs: Mapping[str, Tensor]) -> bool | None:
        """Return whether the model runs on inputs of such shapes; None where that hangs on their numbers."""
        from torch._subclasses import fake_tensor

        mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        unknown = (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
            fake_tensor.UnsupportedOperatorException,
        )
        try:
            with torch.no_grad(), mode, redirect_stderr(io.StringIO()), without_fast_paths():
                _copy(self.model)(**{name: mode.from_tensor(x) for name, x in inputs.items()})
        except unknown:
            return None
        except Exception:  # the user's own code
            return False
        return True

    def _within(self, sizes: Mapping[str, Dimension]) -> bool:
        """Return whether the sizes that are traced are among these."""
        return all(dim.min <= self.traced[name] <= dim.max for name, dim in sizes.items())

    def _runs_elsewhere(self, name: str) -> bool:
        """Return whether the model runs at other sizes of a dimension than that it was traced at."""
        dim, size = self.sizes[name], self.traced[name]
        others = {near for near in (size - 1, size + 1, 2 * size, dim.max) if dim.min <= near <= dim.max} - {size}
        return any(self.runs(self.inputs({**self.traced, name: other})) for other in sorted(others))

    def _export(
        self,
        inputs: Mapping[str, Tensor],
        sizes: Mapping[str, Dimension],
        deferred: bool = False,
        strict: bool = False,
    ) -> ExportedProgram:
        symbols = {
            name: Dim(diagnostics.PREFIX + name, min=size.min, max=size.max)
            for name, size in sizes.items()
            if size.min < size.max
        }
        for name, (of, factor, offset) in self.related.items():
            symbols[name] = factor * symbols[of] + offset if offset else factor * symbols[of]
        shapes = {spec.name: {i: symbols[s] for i, s in enumerate(spec.shape) if s in symbols} for spec in self.specs}
        model, notes = _copy(self.model), list[str]()

        def tensors_alone(module: nn.Module, args: Any, output: Any) -> dict[str, Tensor]:
            tensors, left_out = tensors_of(output, [spec.name for spec in self.specs])
            notes[:] = left_out
            return tensors

        model.register_forward_hook(tensors_alone)
        obliviously = symbolic.patch(backed_size_oblivious=deferred)  # type: ignore[attr-defined]
        try:
            # On some errors torch prints all of the graph that it has.
            with torch.no_grad(), redirect_stderr(io.StringIO()), without_fast_paths(), obliviously:
                program = torch.export.export(
                    model,
                    (),
                    dict(inputs),
                    dynamic_shapes=shapes,
                    strict=strict,
                    prefer_deferred_runtime_asserts_over_guards=deferred,
                )
        finally:
            if strict:
                torch._dynamo.reset()
        self.notes = notes
        return program


def _copy(model: nn.Module, share: bool = True) -> nn.Module:
    """Copy a module, by default sharing its weights, so that a call's changes of attributes stay in the copy."""
    memo: dict[int, Any] = {}
    if share:
        memo = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _named_outputs(model: nn.Module) -> Callable[..., Any]:
    """Return a model that returns its tensors by name, as the captured program does."""

    def call(**inputs: Tensor) -> dict[str, Tensor]:
        with without_fast_paths():
            return tensors_of(model(**inputs), list(inputs))[0]

    return call


def with_specs(captured: Captured, specs: Sequence[InputSpec]) -> Captured:
    """Say of the inputs of a program how large integers may be and what masks mean.

    Raises:
        ConfigError: a name, shape or type that is not the program's.
    """
    inputs = {item.name: item for item in captured.inputs}
    for spec in specs:
        item = inputs.get(spec.name)
        if item is None:
            raise ConfigError(f"the program has no input {spec.name!r}; it takes {', '.join(inputs)}")
        text = captured.shape_text(item)
        shape, dtype = text.split(":")
        if ",".join(map(str, spec.shape)) != shape or spec.dtype not in (None, dtype):
            raise ConfigError(f"--input {spec.name}={spec} is not what the program takes, {spec.name}={text}")
        below = item.below if spec.below is None else spec.below
        ranged = item.ranged or spec.below is not None
        inputs[spec.name] = replace(item, below=below, ranged=ranged, meaning=spec.meaning)
    return replace(captured, inputs=tuple(inputs.values()))


def _check_names(model: nn.Module, specs: Sequence[InputSpec]) -> None:
    parameters = inspect.signature(model.forward).parameters
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    shown = ", ".join(stars.get(parameter.kind, "") + name for name, parameter in parameters.items())
    takes = f"{type(model).__name__}.forward takes ({shown})"
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind not in stars}
    for spec in specs:
        if spec.name not in named:
            raise ConfigError(f"the model has no input {spec.name!r}; {takes}")
    given = {spec.name for spec in specs}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given:
            raise ConfigError(f"the input {name!r} is not described; {takes}")


def _trace_sizes(dims: Mapping[str, Dimension]) -> Iterator[dict[str, int]]:
    """Return sizes to capture at: unlike 1 and unlike one another, so that none is taken for another.

    Small ones first, and then multiples of powers of two, which patches, windows and strides ask for.
    """
    seen = []
    for unit in (1, 8, 64, 224):
        sizes: dict[str, int] = {}
        for name, dim in dims.items():
            step = 1 if dim.is_batch else unit
            least = max(dim.min, min(3 if unit == 1 else 2 * step if dim.is_batch else step, dim.max))
            candidates = range(-(-least // step) * step, dim.max + 1, step)
            sizes[name] = next((size for size in candidates if size not in sizes.values()), dim.max)
        if sizes not in seen:
            seen.append(sizes)
            yield sizes
    usual = {name: max(dim.opt, min(2, dim.max)) for name, dim in dims.items()}
    if usual not in seen and len(set(usual.values())) == len(usual):
        yield usual


def _model_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Keep torch.nn.MultiheadAttention and its like to the way that torch.export captures.

    The other one drops tokens that are padding, and fails where nothing else is there.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

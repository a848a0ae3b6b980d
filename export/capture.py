"""One form for every model: a program captured by torch.export, with names and sizes for its dimensions."""

from __future__ import annotations

import copy
import inspect
import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from adaattn.attention.base import AttentionBase
from adaattn.encoder import Encoder
from adaattn.errors import ConfigError, ExportError
from adaattn.export import complaints
from adaattn.export.index_limits import Size, index_limits
from adaattn.input_spec import INT_MAX, Dimension, InputSpec, default_dimension


@dataclass(frozen=True)
class CapturedInput:
    """One input of a program: sizes are numbers or expressions of the program's symbols.

    Args:
        below: integers lie in [0, below).
        meaning: of `adaattn.input_spec.MEANINGS`, where it is known.
        ranged: whether `below` was stated or follows from the program; not if it is that of an example.
        distinct: whether integers are places that are written to: no two may be the same.
        hides: whether a mask may let a query attend to nothing.
    """

    name: str
    shape: tuple[Size, ...]
    dtype: torch.dtype
    below: Size | None = None
    meaning: str | None = None
    ranged: bool = False
    distinct: bool = False
    hides: bool = True

    def sizes(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape at given values of the symbols, by their names in the program."""
        return tuple(_at(size, values) for size in self.shape)

    def limit(self, values: Mapping[str, int]) -> int | None:
        """`below` at given values of the symbols."""
        return None if self.below is None else _at(self.below, values)


@dataclass(frozen=True)
class Captured:
    """A program and what is known about it.

    `eager` is the model itself where there is one: what every backend must agree with. `in_double` makes a copy of it
    with float64 weights.
    """

    model_name: str
    program: ExportedProgram
    eager: Callable[..., Any]
    in_double: Callable[[], Callable[..., Any]]
    inputs: tuple[CapturedInput, ...]
    dims: Mapping[str, Dimension]  # by symbol of the program
    output_names: tuple[str, ...]
    example: Mapping[str, Tensor] | None  # the user's own inputs, where given
    written: tuple[str, ...] = ()  # inputs that forward writes into: what becomes of them are the last outputs

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, or of the inputs where there are none."""
        tensors = [*self.program.state_dict.values(), *self.inputs]
        return next((x.dtype for x in tensors if x.dtype.is_floating_point), torch.float32)

    def shape_text(self, item: CapturedInput) -> str:
        """`B,S,512:float32`, in the names of the dimensions."""
        text = ",".join(str(size) for size in item.shape)
        for symbol, dimension in self.dims.items():
            text = re.sub(rf"\b{symbol}\b", dimension.name, text)
        return f"{text}:{str(item.dtype).removeprefix('torch.')}"


def default_inputs(model: nn.Module) -> tuple[InputSpec, ...]:
    """Inputs of the modules of this package, which need no description.

    Raises:
        ConfigError: another model, whose inputs nobody described.
    """
    if isinstance(model, Encoder):
        return (InputSpec("x", ("B", "S", model.embed_dim)),)
    if isinstance(model, AttentionBase):
        widths = {"query": model.embed_dim, "key": model.kdim, "value": model.vdim}
        return tuple(
            InputSpec(name, ("B", "S" if name == "query" else "K", width or model.embed_dim))
            for name, width in widths.items()
        )
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
    """Capture a module by torch.export.

    Args:
        model: in eval mode.
        specs: its inputs; dimensions named in them are dynamic.
        dims: sizes of named dimensions; those not given get `default_dimension`.
        example: the user's own inputs, used to capture and to verify.

    Raises:
        ConfigError: inputs or dimensions that the model does not take.
        ExportError: torch.export cannot capture the model.
    """
    from torch._dynamo.exc import UserError  # slow to import

    _check_names(model, specs)
    order = list(inspect.signature(model.forward).parameters)
    specs = sorted(specs, key=lambda spec: order.index(spec.name) if spec.name in order else len(order))
    used = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    _check_dims(dims, used)
    sizes = {name: dims.get(name, default_dimension(name)) for name in sorted(used)}
    traced = _trace_sizes(sizes)
    # Copies: torch.export takes one tensor given twice for one input.
    inputs = {spec.name: example[spec.name].clone() if example else _example(spec, traced, model) for spec in specs}
    moving = {name: size for name, size in sizes.items() if size.min < size.max}
    try:
        symbols = {name: Dim(complaints.PREFIX + name, min=size.min, max=size.max) for name, size in moving.items()}
        shapes = {spec.name: {i: symbols[s] for i, s in enumerate(spec.shape) if s in symbols} for spec in specs}
        # On some errors torch prints all of the graph that it has.
        with torch.no_grad(), redirect_stderr(io.StringIO()):
            program = torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except UserError as error:
        raise ConfigError(complaints.of_dimensions(str(error), sizes)) from error
    except Exception as error:  # the user's own code runs here
        raise ExportError(complaints.of_model(error, model, specs, inputs)) from error
    names: dict[str, Dimension] = {}
    for spec, item in zip(specs, _program_inputs(program), strict=True):
        for size, symbol in zip(spec.shape, item.shape, strict=True):
            if isinstance(size, str) and not isinstance(symbol, int):
                names[str(symbol)] = sizes[size]
    captured = tuple(
        replace(item, below=spec.below, meaning=spec.meaning)
        for spec, item in zip(specs, _program_inputs(program), strict=True)
    )
    captured = _with_limits(captured, program, example)

    def in_double() -> nn.Module:
        return copy.deepcopy(model).double()

    return Captured(type(model).__name__, program, model, in_double, captured, names, _output_names(program), example)


def capture_program(program: ExportedProgram, dims: Mapping[str, Dimension]) -> Captured:
    """A program as it was saved: its dimensions are its symbols, their sizes its range constraints.

    Args:
        dims: sizes by symbol; within the program's own range, or needed where that has no end.

    Raises:
        ConfigError: sizes outside a range, an unknown symbol, or a range without an end that nobody closed.
    """
    inputs = _program_inputs(program)
    shapes = "; ".join(f"{item.name}={','.join(map(str, item.shape))}" for item in inputs)
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    used = sorted({str(s) for item in inputs for size in item.shape for s in getattr(size, "free_symbols", ())})
    _check_dims(dims, set(used), f" in {shapes}")
    sizes = {}
    for symbol in used:
        # Without an end, torch's own infinity, which is greater than any number and yet says that it is finite.
        low = max(1, int(ranges[symbol].lower))
        high = None if ranges[symbol].upper >= INT_MAX else int(ranges[symbol].upper)
        size = dims.get(symbol)
        if size is None:
            if high is None:
                raise ConfigError(
                    f"dimension {symbol} of the program ({shapes}) has no upper bound; give one, such as "
                    f"--dim {symbol}={low}:{max(low, 128)}:{max(low, 1024)}"
                )
            size = Dimension(symbol, low, min(max(low, 128), high), high)
        if size.min < low or (high is not None and size.max > high):
            end = "∞" if high is None else high
            raise ConfigError(f"dimension {symbol}={size}: the program takes {low} to {end}")
        sizes[symbol] = size
    example: dict[str, Tensor] | None = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if len(tensors) == len(inputs):
            example = {item.name: x for item, x in zip(inputs, tensors, strict=True)}
    inputs = _with_limits(inputs, program, example)
    structure = program.call_spec.in_spec
    if structure is None or structure.num_leaves != len(inputs):
        raise ConfigError("the program takes inputs that are not tensors; capture it with tensors alone")

    def callable_of(module: nn.Module) -> Callable[..., Any]:
        def call(**tensors: Tensor) -> Any:
            args, kwargs = torch.utils._pytree.tree_unflatten([tensors[item.name] for item in inputs], structure)
            return module(*args, **kwargs)

        return call

    return Captured(
        "ExportedProgram",
        program,
        callable_of(program.module()),
        lambda: callable_of(copy.deepcopy(program.module()).double()),  # its parameters are the program's own
        inputs,
        sizes,
        _output_names(program),
        example,
    )


def _at(size: Size, values: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else int(size.subs({s: values[str(s)] for s in size.free_symbols}))


def _with_limits(
    inputs: Sequence[CapturedInput], program: ExportedProgram, example: Mapping[str, Tensor] | None
) -> tuple[CapturedInput, ...]:
    """Say how large integers may be: what is stated comes first, then the program, then the user's own inputs."""
    limits = index_limits(program)
    found = []
    for item in inputs:
        if item.name in limits:
            limit = limits[item.name]
            below = limit.below if item.below is None else item.below
            item = replace(item, below=below, ranged=below is not None, distinct=limit.distinct)
            if below is None and example and example[item.name].numel():
                item = replace(item, below=max(2, int(example[item.name].max()) + 1))
        found.append(item)
    return tuple(found)


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


def _check_dims(dims: Mapping[str, Dimension], used: set[str], where: str = "") -> None:
    for name in dims:
        if name not in used:
            known = ", ".join(sorted(used)) or "none"
            raise ConfigError(f"no input has a dimension {name!r}; dynamic dimensions are {known}{where}")


def _trace_sizes(dims: Mapping[str, Dimension]) -> dict[str, int]:
    """A size of each dimension to capture at: unlike 1 and unlike one another, so that none is taken for another."""
    sizes: dict[str, int] = {}
    for name, dim in dims.items():
        candidates = (size for size in range(max(dim.min, min(3, dim.max)), dim.max + 1) if size not in sizes.values())
        sizes[name] = next(candidates, dim.max)
    return sizes


def _example(spec: InputSpec, sizes: Mapping[str, int], model: nn.Module) -> Tensor:
    shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
    dtype = getattr(torch, spec.dtype) if spec.dtype else _model_dtype(model)
    if dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)


def _model_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _program_inputs(program: ExportedProgram) -> tuple[CapturedInput, ...]:
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = []
    for name in users:
        value = nodes[name].meta.get("val")
        if isinstance(value, Tensor):
            sizes = tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)
            inputs.append(CapturedInput(name, sizes, value.dtype))
    return tuple(inputs)


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """`output`, or `output_0`, `output_1` …; a dictionary's keys where the model returns one."""
    spec = program.call_spec.out_spec
    kinds = [item.kind for item in program.graph_signature.output_specs]
    node = next(node for node in program.graph.nodes if node.op == "output")
    tensors = [
        isinstance(getattr(value, "meta", {}).get("val"), Tensor)
        for value, kind in zip(node.args[0], kinds, strict=True)
        if kind is OutputKind.USER_OUTPUT
    ]
    count = sum(tensors)
    if count == 0:
        raise ExportError("the model returns no tensor")
    if spec is not None and spec.type is dict and len(spec.context) == count:
        names = [str(key) for key in spec.context]
    else:
        names = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    taken = {item.name for item in _program_inputs(program)}
    return tuple(f"{name}_out" if name in taken else name for name in names)

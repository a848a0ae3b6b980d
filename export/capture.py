"""One form for every model: a program captured by torch.export, with names and sizes for its dimensions."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from adaattn.attention.base import AttentionBase
from adaattn.encoder import Encoder
from adaattn.errors import ConfigError, ExportError
from adaattn.input_spec import Dimension, InputSpec, default_dimension

Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class CapturedInput:
    """One input of a program: sizes are numbers or expressions of the program's symbols."""

    name: str
    shape: tuple[Size, ...]
    dtype: torch.dtype
    below: int | None = None

    def sizes(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape at given values of the symbols, by their names in the program."""
        return tuple(
            size if isinstance(size, int) else int(size.subs({s: values[str(s)] for s in size.free_symbols}))
            for size in self.shape
        )


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
    _check_names(model, specs)
    order = list(inspect.signature(model.forward).parameters)
    specs = sorted(specs, key=lambda spec: order.index(spec.name) if spec.name in order else len(order))
    used = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    _check_dims(dims, used)
    sizes = {name: dims.get(name, default_dimension(name)) for name in sorted(used)}
    traced = _trace_sizes(sizes)
    # Copies: torch.export takes one tensor given twice for one input.
    inputs = {spec.name: example[spec.name].clone() if example else _example(spec, traced, model) for spec in specs}
    symbols = {name: Dim(name, min=size.min, max=size.max) for name, size in sizes.items() if size.min < size.max}
    shapes = {
        spec.name: {axis: symbols[size] for axis, size in enumerate(spec.shape) if size in symbols} for spec in specs
    }
    try:
        with torch.no_grad():
            program = torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        raise ConfigError(_constraint(str(error), sizes)) from error
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        shown = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise ExportError(f"the model does not run on inputs of shape {shown}: {lines[0]}") from error
    names: dict[str, Dimension] = {}
    for spec, item in zip(specs, _program_inputs(program), strict=True):
        for size, symbol in zip(spec.shape, item.shape, strict=True):
            if isinstance(size, str) and not isinstance(symbol, int):
                names[str(symbol)] = sizes[size]
    captured = tuple(
        CapturedInput(item.name, item.shape, item.dtype, spec.below)
        for spec, item in zip(specs, _program_inputs(program), strict=True)
    )

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
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    used = sorted({str(s) for item in inputs for size in item.shape for s in getattr(size, "free_symbols", ())})
    _check_dims(dims, set(used))
    sizes = {}
    for symbol in used:
        low, high = ranges[symbol].lower, ranges[symbol].upper
        low, high = max(1, int(low)), int(high) if high.is_finite and int(high) < 2**31 - 1 else None
        size = dims.get(symbol)
        if size is None:
            if high is None:
                raise ConfigError(
                    f"dimension {symbol} of the program has no upper bound; give one: --dim {symbol}={low}:128:1024"
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
    # Integers are indices into something: no larger than those of the example.
    below = {name: int(x.max()) + 1 for name, x in (example or {}).items() if x.dtype in (torch.int64, torch.int32)}
    inputs = tuple(CapturedInput(item.name, item.shape, item.dtype, below.get(item.name)) for item in inputs)
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
        lambda: callable_of(program.module().double()),
        inputs,
        sizes,
        _output_names(program),
        example,
    )


def _check_names(model: nn.Module, specs: Sequence[InputSpec]) -> None:
    parameters = inspect.signature(model.forward).parameters
    takes = f"{type(model).__name__}.forward takes ({', '.join(parameters)})"
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for spec in specs:
        if spec.name not in parameters:
            raise ConfigError(f"the model has no input {spec.name!r}; {takes}")
    given = {spec.name for spec in specs}
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and name not in given and not variadic:
            raise ConfigError(f"the input {name!r} is not described; {takes}")


def _check_dims(dims: Mapping[str, Dimension], used: set[str]) -> None:
    for name in dims:
        if name not in used:
            raise ConfigError(
                f"no input has a dimension {name!r}; dynamic dimensions are {', '.join(sorted(used)) or 'none'}"
            )


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
        return tuple(str(key) for key in spec.context)
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))


def _constraint(message: str, dims: Mapping[str, Dimension]) -> str:
    """torch.export's report on dimensions, in one line."""
    for name in dims:
        fixed = re.search(rf"\b{name} = (\d+)\b", message) or re.search(
            rf"\({name}\b.*?specialized.*?constant \((\d+)\)", message, re.DOTALL
        )
        if fixed:
            return f"the model fixes dimension {name} to {fixed[1]}; write {fixed[1]} in its place in --input"
    same = re.search(r"\b(\w+) = (\w+)\b", message.split("Suggested fixes", 1)[-1])
    if same and {same[1], same[2]} <= set(dims):
        return f"the model wants dimensions {same[1]} and {same[2]} to be the same; give them one name in --input"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return f"the model does not take these dimensions: {' '.join(lines[:2])}"

"""Take a program that torch.export made, as from a .pt2 file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from adaattn.errors import ConfigError
from adaattn.export.capture import diagnostics
from adaattn.export.capture.captured import (
    Captured,
    CapturedInput,
    check_dims,
    output_values,
    program_inputs,
    program_outputs,
    with_graph,
    with_limits,
)
from adaattn.export.capture.sizes import Sizes, conditions
from adaattn.input_spec import INT_MAX, Dimension


def capture_program(program: ExportedProgram, dims: Mapping[str, Dimension]) -> Captured:
    """Return a program as it was saved: its dimensions are its symbols, their sizes its range constraints.

    Args:
        dims: sizes by symbol; within the program's own range, or needed where that has no end.

    Raises:
        ConfigError: sizes outside a range, an unknown symbol, or a range without an end.
    """
    module = program.module()
    output_names, notes = program_outputs(program)
    program = _without_constants(program)
    inputs = program_inputs(program)
    shapes = "; ".join(f"{item.name}={','.join(map(str, item.shape))}" for item in inputs)
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    used = sorted({str(s) for item in inputs for size in item.shape for s in getattr(size, "free_symbols", ())})
    check_dims(dims, set(used), f" in {shapes}")
    sizes = {}
    for symbol in used:
        # Without an end, torch's own infinity, which is greater than any number and yet says that it is finite.
        least = int(ranges[symbol].lower)
        low = max(1, least)
        high = None if ranges[symbol].upper >= INT_MAX else int(ranges[symbol].upper)
        size = dims.get(symbol)
        if size is None:
            if high is None:
                raise ConfigError(
                    f"dimension {symbol} of the program ({shapes}) has no upper bound; give one, such as "
                    f"--dim {symbol}={low}:{max(low, 128)}:{max(low, 1024)}"
                )
            size = Dimension(symbol, low, min(max(low, 128), high), high)
        if size.min < least or (high is not None and size.max > high):
            end = "∞" if high is None else high
            raise ConfigError(f"dimension {symbol}={size}: the program takes {least} to {end}")
        sizes[symbol] = size
    example: dict[str, Tensor] | None = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if len(tensors) == len(inputs):
            example = {item.name: x for item, x in zip(inputs, tensors, strict=True)}
    inputs = with_limits(inputs, program, example)
    eager, in_double = eager_of(program, module, inputs)
    found = Sizes(sizes, conditions(program, used), _example_sizes(inputs, example))
    fitted = found.fitted()
    for symbol, size in fitted.items():
        notes += diagnostics.check_fitted(size, sizes[symbol], symbol in dims)
    found = replace(found, dims=fitted)
    notes += found.gaps()
    return Captured(
        "ExportedProgram",
        program,
        eager,
        in_double,
        inputs,
        fitted,
        output_names,
        example,
        found,
        notes=tuple(notes),
    )


def eager_of(
    program: ExportedProgram, module: nn.Module, inputs: Sequence[CapturedInput]
) -> tuple[Callable[..., Any], Callable[[], Callable[..., Any]]]:
    """Return what calls a program's module with its inputs by name, and what makes the same of a float64 copy.

    Raises:
        ConfigError: the program takes inputs that are not tensors.
    """
    structure = program.call_spec.in_spec
    if structure is None or structure.num_leaves != len(inputs):
        raise ConfigError("the program takes inputs that are not tensors; capture it with tensors alone")

    def callable_of(module: nn.Module) -> Callable[..., Any]:
        def call(**tensors: Tensor) -> Any:
            args, kwargs = torch.utils._pytree.tree_unflatten([tensors[item.name] for item in inputs], structure)
            return module(*args, **kwargs)

        return call

    # Its parameters are the program's own: only a copy is changed.
    return callable_of(module), lambda: callable_of(copy.deepcopy(module).double())


def _example_sizes(inputs: Sequence[CapturedInput], example: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Return the sizes of a program's example, by symbol."""
    return {
        str(symbol): size
        for item in inputs
        for symbol, size in zip(item.shape, example[item.name].shape if example else (), strict=False)
        if isinstance(symbol, sympy.Symbol)
    }


def _without_constants(program: ExportedProgram) -> ExportedProgram:
    """Return a program that returns only tensors, since ONNX has no other outputs."""
    tensors = [isinstance(x, Tensor) for x in output_values(program)]
    if all(tensors):
        return program
    graph_module = copy.deepcopy(program.graph_module)
    node = next(node for node in graph_module.graph.nodes if node.op == "output")
    signature = program.graph_signature
    left = iter(tensors)
    keep = [item.kind is not OutputKind.USER_OUTPUT or next(left) for item in signature.output_specs]
    node.args = (tuple(x for x, kept in zip(node.args[0], keep, strict=True) if kept),)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    calls = copy.deepcopy(program.module_call_graph)
    root = calls[0].signature
    assert root is not None
    _, root.out_spec = torch.utils._pytree.tree_flatten((None,) * sum(tensors))
    specs = [item for item, kept in zip(signature.output_specs, keep, strict=True) if kept]
    return with_graph(program, graph_module, replace(signature, output_specs=specs), calls)

"""Describe a captured program: its inputs, the sizes of its dimensions, and the eager model."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind
from torch.fx import GraphModule, Node

from adaattn.errors import ConfigError, ExportError
from adaattn.export.capture.index_limits import Size, index_limits
from adaattn.export.capture.sizes import Sizes
from adaattn.input_spec import Dimension


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
        """Return the shape at given values of the symbols, by their names in the program."""
        return tuple(_at(size, values) for size in self.shape)

    def limit(self, values: Mapping[str, int]) -> int | None:
        """Return `below` at given values of the symbols."""
        return None if self.below is None else _at(self.below, values)


@dataclass(frozen=True)
class Captured:
    """A program and what is known about it.

    `eager` is the model itself where there is one: what every backend must agree with. `in_double` makes a copy of it
    with float64 weights. Where attention was replaced, both are of the program, and `original` makes the float64 copy
    of the model. `sizes` says which of the sizes within `dims` the model takes; `notes` is what the user should know of
    the capture.
    """

    model_name: str
    program: ExportedProgram
    eager: Callable[..., Any]
    in_double: Callable[[], Callable[..., Any]]
    inputs: tuple[CapturedInput, ...]
    dims: Mapping[str, Dimension]  # by symbol of the program
    output_names: tuple[str, ...]
    example: Mapping[str, Tensor] | None  # the user's own inputs, where given
    sizes: Sizes
    written: tuple[str, ...] = ()  # inputs that forward writes into: their new values are the last outputs
    notes: tuple[str, ...] = ()
    original: Callable[[], Callable[..., Any]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, or of the inputs where there are none."""
        tensors = [*self.program.state_dict.values(), *self.inputs]
        return next((x.dtype for x in tensors if x.dtype.is_floating_point), torch.float32)

    def shape_text(self, item: CapturedInput) -> str:
        """Return a shape such as `B,S,512:float32`, with the names of the dimensions."""
        text = ",".join(str(size) for size in item.shape)
        for symbol, dimension in self.dims.items():
            text = re.sub(rf"\b{symbol}\b", dimension.name, text)
        return f"{text}:{str(item.dtype).removeprefix('torch.')}"


def program_outputs(program: ExportedProgram) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of the tensors that a program returns, and a line on each other output."""
    spec = program.call_spec.out_spec
    assert spec is not None
    leaves = [torch.empty(0) if isinstance(x, Tensor) else x for x in output_values(program)]
    taken = [item.name for item in program_inputs(program)]
    tensors, notes = tensors_of(torch.utils._pytree.tree_unflatten(leaves, spec), taken)
    return tuple(tensors), notes


def output_values(program: ExportedProgram) -> list[Any]:
    """Return what the traced program gave its caller."""
    node = next(node for node in program.graph.nodes if node.op == "output")
    return [
        getattr(x, "meta", {}).get("val", x) if isinstance(x, torch.fx.Node) else x
        for x, item in zip(node.args[0], program.graph_signature.output_specs, strict=True)
        if item.kind is OutputKind.USER_OUTPUT
    ]


def _at(size: Size, values: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else int(size.subs({s: values[str(s)] for s in size.free_symbols}))


def with_limits(
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


def check_dims(dims: Mapping[str, Dimension], used: set[str], where: str = "") -> None:
    """Raise ConfigError where a dimension is described that no input uses."""
    for name in dims:
        if name not in used:
            known = ", ".join(sorted(used)) or "none"
            raise ConfigError(f"no input has a dimension {name!r}; dynamic dimensions are {known}{where}")


def program_inputs(program: ExportedProgram) -> tuple[CapturedInput, ...]:
    """Return the inputs of a program, with symbolic shapes."""
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = []
    for name in users:
        value = nodes[name].meta.get("val")
        if isinstance(value, Tensor):
            sizes = tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)
            inputs.append(CapturedInput(name, sizes, value.dtype))
    return tuple(inputs)


def tensors_of(output: Any, taken: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that a model returns, by name and in order, and a line on each other value.

    `output`, or `output_0`, `output_1` …; of a dictionary, a dataclass or a named tuple its keys. What is inside these,
    or in a cache of transformers, is named by the whole way to it.

    Raises:
        ExportError: there is no tensor.
    """
    leaves = list(_leaves(output))
    count = sum(isinstance(x, Tensor) for _, x in leaves)
    if not count:
        raise ExportError("the model returns no tensor")
    found: dict[str, Tensor] = {}
    left_out = []
    for path, x in leaves:
        if not isinstance(x, Tensor):
            kind = type(x).__name__.removeprefix("Sym").lower()
            where = "".join(f"[{key!r}]" for key in path)
            left_out.append(f"output{where} is of type {kind}, no tensor, and left out of the file")
            continue
        if path and isinstance(path[0], str):
            name = "_".join(map(str, path))
        else:
            name = "output" if count == 1 else f"output_{len(found)}"
        name = f"{name}_out" if name in taken else name or "output"
        same = 1
        unique = name
        while unique in found or unique in taken:
            same += 1
            unique = f"{name}_{same}"
        found[unique] = x
    return found, left_out


def _leaves(output: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Return what is inside an output, with the keys and places that lead to it; nothing for None."""
    inside: Iterable[tuple[Any, Any]]
    if isinstance(output, Mapping):
        inside = output.items()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        inside = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        inside = zip(output._fields, output, strict=True)
    elif isinstance(output, (list, tuple)):
        inside = enumerate(output)
    elif hasattr(output, "self_attention_cache") and hasattr(output, "cross_attention_cache"):
        inside = (("self", output.self_attention_cache), ("cross", output.cross_attention_cache))
    elif isinstance(getattr(output, "layers", None), list) and not isinstance(output, torch.nn.Module):
        inside = ((i, {"key": layer.keys, "value": layer.values}) for i, layer in enumerate(output.layers))
    else:
        if output is not None:
            yield path, output
        return
    for key, x in inside:
        yield from _leaves(x, (*path, key))


def tensors_held(program: ExportedProgram) -> dict[str, Any]:
    """Return the parameters, buffers and constants of a program by the names of its graph's inputs."""
    held = {**program.constants, **program.state_dict}
    return {
        item.arg.name: held[item.target]
        for item in program.graph_signature.input_specs
        if item.kind is not InputKind.USER_INPUT and item.target in held
    }


def with_graph(
    program: ExportedProgram,
    module: GraphModule,
    signature: ExportGraphSignature | None = None,
    module_call_graph: Sequence[ModuleCallEntry] | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> ExportedProgram:
    """Return a program of another graph, with the weights, constants and conditions of a given one.

    Args:
        signature: of the inputs and outputs; None for that of the program. The outputs' names become the graph's.
        module_call_graph: None for that of the program.
        held: weights and constants by name instead of the program's.
    """
    signature = copy.deepcopy(signature or program.graph_signature)
    returned: Any = next(node for node in module.graph.nodes if node.op == "output").args[0]
    for item, node in zip(signature.output_specs, returned, strict=True):
        if isinstance(node, Node):  # another one, where an attention is itself an output
            item.arg.name = node.name
    state, constants = program.state_dict, program.constants
    if held is not None:
        kept = {item.target for item in signature.input_specs if item.kind is InputKind.PARAMETER or item.persistent}
        state = {name: x for name, x in held.items() if name in kept}
        constants = {name: x for name, x in held.items() if name not in kept}
    return ExportedProgram(
        module,
        module.graph,
        signature,
        state,
        program.range_constraints,
        list(module_call_graph or program.module_call_graph),
        program.example_inputs,
        constants,
        verifiers=program.verifiers,
    )

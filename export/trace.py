"""What the values of a graph are in eager PyTorch, on one small case: a departure is traced to its node by them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaattn.export.golden import Array, load_arrays, save_arrays

if TYPE_CHECKING:
    from adaattn.export.cases import Case
    from adaattn.export.onnx import Lowered


def record(lowered: Lowered, case: Case) -> dict[str, Array]:
    """Values of eager PyTorch by their names in the ONNX graph; inputs are among them.

    The exporter names values after the nodes of the program; those that it adds or fuses have no counterpart.
    """
    import torch
    from torch.fx import Interpreter, Node

    from adaattn.export.reference import array

    known = {value.name for node in lowered.graph.graph for value in node.outputs}
    values: dict[str, Array] = {name: array(x) for name, x in case.inputs.items()}

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> Any:
            result = super().run_node(node)
            if isinstance(result, torch.Tensor) and node.op == "call_function" and node.name in known:
                values[node.name] = array(result)
            return result

    # Outputs have names of their own in the graph.
    names = [output.name for output in lowered.graph.graph.outputs]
    inputs = {name: x.clone() for name, x in case.inputs.items()}  # the program may write into them
    with torch.no_grad():
        outputs = Recorder(lowered.program.module()).run(*inputs.values())
    flat = torch.utils._pytree.tree_leaves(outputs)
    values |= {str(name): array(x) for name, x in zip(names, flat, strict=False) if isinstance(x, torch.Tensor)}
    return values | {output: array(inputs[name]) for name, output in lowered.written.items()}


def save(path: Path, values: Mapping[str, Array]) -> None:
    """Write the values as arrays of one .npz."""
    save_arrays(path, values)


def load(path: Path) -> dict[str, Array]:
    """Read what `save` wrote.

    Raises:
        ConfigError: there is no such file, or it is none of ours.
    """
    return load_arrays(path, "trace of eager PyTorch")

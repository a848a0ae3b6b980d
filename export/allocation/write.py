"""Write an allocation into a program: typed, as torch.onnx takes it, or such that it runs in float32 and float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from adaattn.export.allocation.arithmetic import (
    compute,
    mask_of,
    narrow_mask,
    per_channel,
    stored_numbers,
)
from adaattn.export.allocation.heads import PlannedHeads
from adaattn.export.allocation.sites import Network, attention_arguments, is_float, with_reshapes
from adaattn.export.capture.captured import with_graph
from adaattn.export.formats import FORMATS, FP8, FP32, PLUGIN, rounded, scale_of, stored
from adaattn.export.rewrite.match import SDPA

Constants = Mapping[str, Sequence[float] | PlannedHeads]
"""For each site the scales of its operands at fp8, of those that are not weights, or what its heads are planned by."""


def typed_program(network: Network, plan: Mapping[str, str], constants: Constants) -> ExportedProgram:
    """Return a program whose operators have the types of a plan, with a cast where they differ."""
    # A trace gives every value its type, and fails where operands do not go together.
    return with_reshapes(_Writer(network, plan, constants, TYPED).program().run_decompositions({}))


def emulated_program(network: Network, plan: Mapping[str, str], constants: Constants) -> ExportedProgram:
    """Return a program that keeps its types and rounds every number as the typed one does."""
    return _Writer(network, plan, constants, EMULATED).program()


def unrounded_program(network: Network, plan: Mapping[str, str], constants: Constants) -> ExportedProgram:
    """Return a program with the weights that the typed one stores, which rounds nothing else."""
    return _Writer(network, plan, constants, WEIGHTS).program()


TYPED, EMULATED, WEIGHTS = "typed", "emulated", "weights"


class _Writer:
    def __init__(self, network: Network, plan: Mapping[str, str], constants: Constants, mode: str) -> None:
        self._network, self._plan, self._constants, self._mode = network, plan, constants, mode
        self._typed = mode == TYPED
        self._graph = Graph()
        self._value: Any = None  # stands for what is being written
        self._new: dict[Node, Node] = {}
        self._form: dict[Node, str] = {}  # of the numbers of each new node
        self._cast: dict[tuple[Node, str], Node] = {}
        program = network.program
        self._held = {**program.constants, **program.state_dict}
        self._specs = {item.arg.name: item for item in program.graph_signature.input_specs}
        self._added: list[tuple[Node, InputSpec]] = []
        values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
        self._fake = next(value.fake_mode for value in values if isinstance(value, FakeTensor))

    def program(self) -> ExportedProgram:
        old = self._network.program
        for node in old.graph.nodes:
            self._new[node] = new = self._written(node)
            new.meta = {**node.meta, **new.meta}
            if node.op == "placeholder":
                new.name = node.name  # a graph may give another one
        before = {self._new[node]: node for node in old.graph.nodes if node.op == "placeholder"}
        added, specs = dict(self._added), []
        for node in [each for each in self._graph.nodes if each.op == "placeholder"]:
            if node in before and before[node].users and not node.users:
                self._graph.erase_node(node)  # only the rounded copies of a weight are used
                continue
            specs.append(added.get(node) or self._specs[node.name])
        signature = replace(old.graph_signature, input_specs=specs)
        used = {item.target for item in specs}
        module = GraphModule(torch.nn.Module(), self._graph)
        held = {name: x for name, x in self._held.items() if name in used or not isinstance(x, Tensor)}
        return with_graph(old, module, signature, held=held)

    def _written(self, node: Node) -> Node:
        site = self._network.sites.get(node)
        if site is None:
            moves = node in self._network.constants or self._network.root(node) is not node
            form = self._form_of(node.all_input_nodes) if moves else FP32
            new = self._graph.node_copy(node, lambda x: self._new[x] if moves else self._as(x, FP32))
            self._form[new] = form
            return new
        form = self._plan[site.name]
        carrier, mask = FORMATS[form].carrier, mask_of(node, node.args, node.kwargs)
        if self._mode == WEIGHTS:
            hides = mask and self._mask(mask, form)  # before the node that takes it
            new = self._graph.node_copy(node, lambda x: hides if x is mask else self._stored(node, x, form))
            new.args = tuple(stored_numbers(node, new.args, form))
            if node.target is SDPA and form != PLUGIN:
                scale = attention_arguments(node)[-1]
                new.kwargs = {**new.kwargs, "scale": stored(scale, form)}
            self._form[new] = FP32
            return new

        def operand(x: Node) -> Node:
            return self._as(x, FP32 if x is mask else carrier)

        args = cast(tuple[Any, ...], map_arg(node.args, operand))
        kwargs = cast(dict[str, Any], map_arg(node.kwargs, operand))
        self._value = node.meta["val"]
        new = compute(self._call, node, args, kwargs, form, self._constants_of(node, carrier), self._typed)
        self._form[new] = carrier
        return cast(Node, new)

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        made = self._graph.call_function(target, args, kwargs)
        # The types of a typed program are only known when it is traced again; shapes are those of before.
        quantizes = target is torch.ops.adaattn.quantize_dequantize.default
        made.meta["val"] = args[0].meta["val"] if quantizes else self._value
        return made

    def _form_of(self, operands: Sequence[Node]) -> str:
        return next((self._form[self._new[each]] for each in operands if is_float(each)), FP32)

    def _as(self, node: Node, form: str) -> Node:
        """Return what stands for an old node, in a format."""
        new = self._new[node]
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)) and node in self._network.constants:
            value = value[0]  # parts of a weight
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or self._form[new] == form:
            return new
        if (node, form) not in self._cast:
            weight = node in self._network.constants
            self._cast[node, form] = self._weight(node, form) if weight else self._converted(node, new, form)
        return self._cast[node, form]

    def _converted(self, node: Node, new: Node, form: str) -> Node:
        self._value = node.meta["val"]
        if self._typed:
            made = self._call(torch.ops.aten.to.dtype, new, FORMATS[form].dtype)
        else:
            # Widening rounds nothing.
            made = new if form == FP32 else self._rounded(node, form)
        self._form.setdefault(made, form)
        made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack"))
        return made

    def _rounded(self, node: Node, form: str) -> Node:
        self._value = node.meta["val"]
        return self._call(torch.ops.adaattn.rounded.default, self._new[node], form)

    def _weight(self, node: Node, form: str) -> Node:
        """Return a weight, or a view of it, in a format: the weight itself is stored so."""
        root = self._network.constants[node]
        if node is not root:
            made = self._graph.node_copy(
                node, lambda x: self._as(x, form) if x in self._network.constants else self._new[x]
            )
        else:
            spec = self._specs[node.name]
            name = f"{spec.target}_{form}"
            x = self._held[spec.target].detach()
            x = x.to(FORMATS[form].dtype) if self._typed else rounded(x, form)
            parameter = isinstance(self._held[spec.target], torch.nn.Parameter)
            self._held[name] = torch.nn.Parameter(x, requires_grad=False) if parameter else x
            made = self._placeholder(f"{node.name}_{form}")
            self._added.append((made, replace(spec, arg=TensorArgument(made.name), target=name)))
            value = node.meta["val"]
            made.meta["val"] = value.to(x.dtype)
        self._form[made] = form
        return made

    def _stored(self, site: Node, operand: Node, form: str) -> Node:
        """Return an operand of a site: what depends on weights alone as the file has it, anything else as it is."""
        constant, folded = operand in self._network.constants, operand in self._network.folded
        if not (constant or folded) or not is_float(operand):
            return self._new[operand]
        carrier = FORMATS[form].carrier
        new = self._as(operand, carrier) if constant else self._rounded(operand, carrier)
        if not FORMATS[form].quantized or not folded or operand not in site.args[:2] or site.target is SDPA:
            return new
        place = site.args.index(operand)
        scale = self._scale_of(site, place, FP32)
        self._value = operand.meta["val"]
        return self._call(torch.ops.adaattn.quantize_dequantize.default, new, scale, 0)

    def _mask(self, mask: Node, form: str) -> Any:
        """Return the mask of an attention, with the numbers that the file has where it is a constant."""
        if mask not in self._network.constants and mask not in self._network.folded:
            return self._new[mask]
        self._value = mask.meta["val"]
        rounding = partial(self._call, torch.ops.adaattn.rounded.default, form=FORMATS[form].carrier)
        return narrow_mask(self._call, self._new[mask], form, rounding)

    def _constants_of(self, node: Node, carrier: str) -> Sequence[Any]:
        """Return the constants of a site: for attention numbers, for a product tensors; those of planned heads."""
        known = self._constants.get(node.name, ())
        if isinstance(known, PlannedHeads):
            return [self._constant(f"{node.name}_{name}", x) for name, x in known.tensors().items()]
        if self._plan[node.name] != FP8:
            return ()
        if node.target is SDPA:
            return list(known)
        return [self._scale_of(node, place, carrier) for place in (0, 1)]

    def _scale_of(self, node: Node, place: int, carrier: str) -> Node:
        """Return the scale of one operand of a product: of a linear weight one for each output channel."""
        operand, scale = (
            cast(Node, node.args[place]),
            torch.tensor(cast(Sequence[float], self._constants[node.name])[place]),
        )
        if place == 1 and per_channel(node) and self._network.constants.get(operand) is operand:
            scale = channel_scales(self._held[self._specs[operand.name].target])
        scale = scale.to(FORMATS[carrier].dtype) if self._typed else rounded(scale, carrier)
        made = self._constant(f"{node.name}_scale_{place}", scale)
        self._form[made] = carrier
        return made

    def _constant(self, name: str, x: Tensor) -> Node:
        """Return a new constant of the program."""
        self._held[name] = x
        made = self._placeholder(name)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(made.name), name, None)
        self._added.append((made, spec))
        made.meta["val"] = self._fake.from_tensor(x, static_shapes=True)
        return made

    def _placeholder(self, name: str) -> Node:
        first = next(each for each in self._graph.nodes if each.op == "placeholder")
        with self._graph.inserting_before(first):
            return self._graph.placeholder(name)


def channel_scales(weight: Tensor) -> Tensor:
    """Return a scale of fp8 for each output channel of a linear weight (out, in)."""
    return torch.tensor([scale_of(peak) for peak in weight.detach().abs().amax(1).tolist()])

"""Faults to plant in exported files, and the models that they are planted in, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import adaattn
from adaattn.export import Options, export
from adaattn.planning.precision import FP16_U

WIDTH, HEADS, WORDS = 32, 4, 50
SIZES = {"S": "1:33:48"}
TOKENS = dict.fromkeys(("query", "key", "value"), f"B,S,{WIDTH}")


class Words(nn.Module):
    """A small language model: tokens and positions, one encoder, scores of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.encoder = adaattn.Encoder(WIDTH, HEADS, ("dense", "adaptive"), causal=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.encoder(self.words(ids) + self.positions(positions)))


def make(base: str, folder: Path) -> Path:
    """Export one of the models and return its folder."""
    torch.manual_seed(8)
    options, inputs = Options(("onnx",)), dict(TOKENS)
    layers = ("adaptive_precision", "adaptive")
    if base == "dense":
        model, options = adaattn.DenseAttention(WIDTH, HEADS, causal=True), Options(("onnx",), opset=22)
    elif base == "bias":
        model = adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=1e-2)
        inputs["attention_mask"] = f"B,{HEADS},S,S:float32"
    elif base == "ids":
        model, inputs = Words(), {"ids": "B,S:int64"}
    elif base == "speed":
        model = adaattn.AdaptiveAttention(WIDTH, HEADS, policy="speed")
    elif base == "rungs":
        model = adaattn.AdaptiveAttention(64, HEADS, tolerance=1e-2)
        inputs = dict.fromkeys(TOKENS, "B,S,64")
    elif base == "half":
        model, options = adaattn.Encoder(WIDTH, HEADS, layers), Options(("onnx",), dtype="float16")
        inputs = {"x": f"B,S,{WIDTH}", "attention_mask": "B,S:bool"}
    else:
        if base == "other weights":
            torch.manual_seed(9)
        model = adaattn.Encoder(WIDTH, HEADS, layers, causal=True)
        inputs = {"x": f"B,S,{WIDTH}", "attention_mask": "B,S:bool"}
        options = Options(("onnx",), external_data_threshold=0)
    made = export(model.eval(), inputs, folder / base.replace(" ", "_"), dims=SIZES, options=options)
    assert made.passed, made.report["targets"]
    return made.directory


# An edit returns the name of the value that is wrong first.
Edit = Callable[[onnx.ModelProto, Path], str]
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fault:
    """A fault, the model that it is planted in, and whether the small case of a trace reaches it."""

    name: str
    base: str
    edit: Edit
    traced: bool = True

    def __str__(self) -> str:
        return f"{self.base}: {self.name}"


def attention(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type.startswith("adaptive_attention"))


def node_of(model: onnx.ModelProto, op: str, place: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op][place]


def constant(model: onnx.ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def before(model: onnx.ModelProto, node: onnx.NodeProto, place: int, op: str, *more: str, **attributes: Any) -> str:
    """Put an operator between a node and one of its inputs; return the value that the node makes."""
    new = onnx.helper.make_node(op, [node.input[place], *more], [f"planted_{op}"], **attributes)
    model.graph.node.insert(list(model.graph.node).index(node), new)
    node.input[place] = new.output[0]
    return str(node.output[0])


def _changed(model: onnx.ModelProto, folder: Path, name: str, change: Change) -> str:
    (found,) = [x for x in model.graph.initializer if x.name == name]
    value = numpy_helper.to_array(found, str(folder)).copy()
    found.CopyFrom(numpy_helper.from_array(change(value).astype(value.dtype), name))
    return next(str(node.output[0]) for node in model.graph.node if name in node.input)


def weight(name: str, change: Change) -> Edit:
    """Change a weight that has kept its name."""
    return lambda model, folder: _changed(model, folder, name, change)


def matrix(place: int, change: Change) -> Edit:
    """Change the weight, (in, out), of a MatMul."""
    return lambda model, folder: _changed(model, folder, node_of(model, "MatMul", place).input[1], change)


def attribute(op: str, name: str, change: Callable[[Any], Any], place: int = 0) -> Edit:
    def edit(model: onnx.ModelProto, folder: Path) -> str:
        node = next(n for i, n in enumerate(n for n in model.graph.node if n.op_type.startswith(op)) if i == place)
        found = next(a for a in node.attribute if a.name == name)
        found.CopyFrom(onnx.helper.make_attribute(name, change(onnx.helper.get_attribute_value(found))))
        return str(node.output[0])

    return edit


Find = Callable[[onnx.FunctionProto], str]


def number(wanted: float) -> Find:
    """Find the constant of a function that has this value."""

    def find(function: onnx.FunctionProto) -> str:
        constants = [node for node in function.node if node.op_type == "Constant" and node.attribute[0].HasField("f")]
        (found,) = [node for node in constants if np.isclose(node.attribute[0].f, wanted, rtol=1e-6)]
        return str(found.output[0])

    return find


def chain(*ops: str) -> Find:
    """Find the value that a chain of operators makes, the first of which reads nothing of the others."""

    def find(function: onnx.FunctionProto) -> str:
        values = {name for node in function.node if node.op_type == ops[0] for name in node.output}
        for op in ops[1:]:
            readers = (node for node in function.node if node.op_type == op and values & set(node.input))
            values = {name for node in readers for name in node.output}
        (found,) = values
        return found

    return find


def _node_of(model: onnx.ModelProto, function: str, value: str | Find) -> tuple[onnx.FunctionProto, int, str, str]:
    """Return a function, the place of the node that makes a value in it, the value, and what a call returns first."""
    (found,) = [f for f in model.functions if f.name.startswith(function)]
    name = value if isinstance(value, str) else value(found)
    place = next(i for i, n in enumerate(found.node) if name in n.output)
    return found, place, name, next(str(n.output[0]) for n in model.graph.node if n.op_type == found.name)


def body(function: str, value: str, op: str | None = None, inputs: list[str] | None = None, **more: Any) -> Edit:
    """Change the node of a function that makes a value: its operator, its inputs, or a constant's number."""

    def edit(model: onnx.ModelProto, folder: Path) -> str:
        found, place, _, wrong = _node_of(model, function, value)
        node = found.node[place]
        if op is not None:
            node.op_type = op
            del node.attribute[:]
        if inputs is not None:
            node.input[:] = inputs
        for name, number in more.items():
            (old,) = [a for a in node.attribute if a.name == name]
            old.CopyFrom(onnx.helper.make_attribute(name, number))
        return wrong

    return edit


def scaled(function: str, value: str | Find, factor: float) -> Edit:
    """Multiply a value inside a function."""

    def edit(model: onnx.ModelProto, folder: Path) -> str:
        found, place, name, wrong = _node_of(model, function, value)
        node = found.node[place]
        node.output[list(node.output).index(name)] = "planted_before"
        factor_node = onnx.helper.make_node("Constant", [], ["planted_factor"], value_float=factor)
        found.node.insert(place + 1, onnx.helper.make_node("Mul", ["planted_before", "planted_factor"], [name]))
        found.node.insert(place + 1, factor_node)
        return wrong

    return edit


def finite_bias(op: str, *more: float) -> Edit:
    """Change the finite numbers of a bias, and leave -inf."""

    def edit(model: onnx.ModelProto, folder: Path) -> str:
        node = attention(model)
        mask, place = node.input[7], list(model.graph.node).index(node)
        numbers = [constant(model, f"planted_{i}", np.float32(x)) for i, x in enumerate(more)]
        for new in (
            onnx.helper.make_node("IsInf", [mask], ["planted_where"]),
            onnx.helper.make_node(op, [mask, *numbers], ["planted_changed"]),
            onnx.helper.make_node("Where", ["planted_where", mask, "planted_changed"], ["planted"]),
        ):
            model.graph.node.insert(place, new)
            place += 1
        node.input[7] = "planted"
        return str(node.output[0])

    return edit


def opset_downgraded(model: onnx.ModelProto, folder: Path) -> str:
    next(opset for opset in model.opset_import if opset.domain == "").version = 17
    return ""


def at(place: int, op: str, value: Any | None = None, **attributes: Any) -> Edit:
    """Put an operator in front of an input of the first adaptive attention."""

    def edit(model: onnx.ModelProto, folder: Path) -> str:
        more = [] if value is None else [constant(model, "planted", value)]
        return before(model, attention(model), place, op, *more, **attributes)

    return edit


def in_front(op: str, place: int, new: str, value: Any, which: int = 0) -> Edit:
    """Put an operator in front of an input of a node of the graph."""

    def edit(model: onnx.ModelProto, folder: Path) -> str:
        return before(model, node_of(model, op, which), place, new, constant(model, "planted", value))

    return edit


def causal_shifted(model: onnx.ModelProto, folder: Path) -> str:
    """Compare keys with the query after the one that they belong to."""
    return before(model, node_of(model, "LessOrEqual"), 1, "Add", constant(model, "planted", np.int64(1)))


def heads_transposed(model: onnx.ModelProto, folder: Path) -> str:
    node = next(node for node in model.graph.node if attention(model).output[0] in node.input)
    return before(model, node, 0, "Gather", constant(model, "planted", np.arange(HEADS)[::-1].copy()), axis=1)


def keys_and_values_swapped(model: onnx.ModelProto, folder: Path) -> str:
    node = attention(model)
    node.input[1], node.input[2] = node.input[2], node.input[1]
    return str(node.output[0])


def overflow(model: onnx.ModelProto, folder: Path) -> str:
    """Let an intermediate overflow float16, as in a careless kernel."""
    node = attention(model)
    before(model, node, 2, "Div", constant(model, "big", np.float16(60000)))
    return before(model, node, 2, "Mul", constant(model, "tiny", np.float16(6e-8)))


def moments_of_another(model: onnx.ModelProto, folder: Path) -> str:
    """Return the plan reads the energy of the queries where that of the keys belongs."""
    plan = node_of(model, "plan")
    plan.input[4] = plan.input[1]
    return str(plan.output[0])


def ladder_cut(model: onnx.ModelProto, folder: Path) -> str:
    """Return the second step of the plan is the third."""
    plan = node_of(model, "plan")
    (ladder,) = [x for x in model.graph.initializer if x.name == plan.input[9]]
    steps = numpy_helper.to_array(ladder, str(folder)).copy()
    steps[:, 1] = steps[:, 2]
    ladder.CopyFrom(numpy_helper.from_array(steps, ladder.name))
    return str(plan.output[0])


def one(index: Any, share: float) -> Change:
    """Change one row, column or number by a share."""

    def change(x: np.ndarray) -> np.ndarray:
        x[index] *= 1 + share
        return x

    return change


def times(factor: float) -> Change:
    return lambda x: x * factor


def rows_swapped(x: np.ndarray) -> np.ndarray:
    x[[46, 47]] = x[[47, 46]]
    return x


KEPT_HALF = np.repeat([1, 0], WIDTH // HEADS // 2).astype(np.float32)


# Words that are not among the eighteen of the small case, but among those of the golden inputs.
UNTRACED = ("rows 46 and 47 swapped", "one row × 1.001")


def faults() -> Iterator[Fault]:
    """Yield all faults, at least 40 on six models."""
    encoder = {
        "scale × 1.01": attribute("adaptive_attention", "scale", lambda x: x * 1.01),
        "scale × 1.001": attribute("adaptive_attention", "scale", lambda x: x * 1.001),
        "scale × 1.001 in the second layer": attribute("adaptive_attention", "scale", lambda x: x * 1.001, 1),
        "causality lost": attribute("adaptive_attention", "is_causal", lambda x: 0),
        "rank halved behind the plan": at(0, "Mul", KEPT_HALF),
        "keys that nobody centres": at(1, "Add", np.float32(30)),
        "mask inverted": at(7, "Not"),
        "heads transposed": heads_transposed,
        "keys and values swapped": keys_and_values_swapped,
        "limit × 2": attribute("plan", "limit", lambda x: x * 2),
        "limit × 1.05": attribute("plan", "limit", lambda x: x * 1.05, 1),
        "int8 noise × 0.25 in the plan": scaled("plan", number(12 * 127**2), 4.0),
        "plan from other moments": moments_of_another,
        "ladder without its second step": ladder_cut,
        "epsilon of a norm × 10": attribute("LayerNormalization", "epsilon", lambda x: x * 10),
        "gain of norms × 1.001": weight("stack.0.attention_norm.weight", times(1.001)),
        "one number of a weight × 1.001": matrix(-1, one((2, 3), 1e-3)),
        "values' peak × 0.5": at(4, "Mul", np.float32(0.5)),
        "keys' mean × 1.1": at(3, "Mul", np.float32(1.1)),
        "opset downgraded": opset_downgraded,
    }
    dense = {
        "causality shifted by one": causal_shifted,
        "output weights × 1.001": matrix(-1, times(1.001)),
        "one column of keys' weights × 1.001": matrix(1, one((slice(None), 3), 1e-3)),
        "one number of queries' weights × 1.001": matrix(0, one((3, 5), 1e-3)),
        "a bias × 1.001": weight("v_proj.bias", times(1.001)),
        "scores × 1.001": in_front("Softmax", 0, "Mul", np.float32(1.001)),
        "softmax over queries": attribute("Softmax", "axis", lambda x: 2),
    }
    bias = {
        "ignored": finite_bias("Mul", 0),
        "doubled": finite_bias("Mul", 2),
        "negated": finite_bias("Neg"),
        "× 1.001": finite_bias("Mul", 1.001),
        "clipped to ±1": finite_bias("Clip", -1, 1),
        "one value's weight × 1.001": matrix(2, one((4, 4), 1e-3)),
    }
    ids = {
        "clipped to 40": in_front("Gather", 1, "Min", np.int64(40)),
        "0 read as 1": in_front("Gather", 1, "Max", np.int64(1)),
        "rows 46 and 47 swapped": weight("words.weight", rows_swapped),
        "one row × 1.001": weight("words.weight", one(7, 1e-3)),
        "a position × 1.001": weight("positions.weight", one(2, 1e-3)),
        "a score's bias × 1.01": weight("head.bias", one(5, 0.01)),
    }
    speed = {
        "a projection × 1.003": matrix(0, times(1.003)),
        "another projection × 1.001": matrix(-1, times(1.001)),
        "limit × 2": attribute("plan", "limit", lambda x: x * 2),
        "fp8 values' unit × 1.01": scaled("adaptive_attention", "fp8_unit", 1.01),
        "probabilities of fp8 unrounded": body("adaptive_attention", "p_fp8", "Identity", ["p_scaled"]),
        "int8 without a sign": body("adaptive_attention", "int8_min", value_float=0.0),
    }
    cut_energy = chain("Range", "GreaterOrEqual", "Where", "ReduceSum")
    rungs = {
        "fp16 keys × 1.1": scaled("adaptive_attention", "k_fp16", 1.1),
        "fp16 values × 1.001": scaled("adaptive_attention", "v_fp16", 1.001),
        "bf16 queries unrounded": body("adaptive_attention", "q_bf16", "Identity", ["q"]),
        "int8 by truncation": body("adaptive_attention", "k_round", "Floor"),
        "fp16 where bf16 belongs": body("adaptive_attention", "p_if_bf16", inputs=["is_bf16", "p_fp16", "p"]),
        "rank one too high": body("adaptive_attention", "kept", "LessOrEqual"),
        "int8's code unknown": body("adaptive_attention", "int8_code", value_int=5),
        "fp16 noise × 0.01 in the plan": scaled("plan", number(2 * FP16_U**2), 0.01),
        "plan without dimensions that are cut": scaled("plan", cut_energy, 0.0),
        "token peaks × 0.9": scaled("token_moments", "token_peak", 0.9),
    }
    tables = {"encoder": encoder, "dense": dense, "bias": bias, "ids": ids, "speed": speed, "rungs": rungs}
    for base, table in tables.items():
        for name, edit in table.items():
            yield Fault(name, base, edit, name not in UNTRACED)
    yield Fault("overflow", "half", overflow)

"""The table of the ops is what torch knows of them, and what ONNX is told."""

from __future__ import annotations

import pytest
import torch

import adaattn.ops  # noqa: F401 registers what torch.ops.adaattn names
from adaattn.export.onnx.functions import DOMAIN, function
from adaattn.export.onnx.lower import OLDEST_OPSET
from adaattn.ops.signatures import OPS, VARIANTS


@pytest.mark.parametrize("name", OPS)
def test_the_table_is_the_schema_of_torch(name: str) -> None:
    schema, op = getattr(torch.ops.adaattn, name).default._schema, OPS[name]
    assert tuple(argument.name for argument in schema.arguments) == op.parameters
    assert len(schema.returns) == len(op.outputs)
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    masks = {x.name for x in op.masks.values()}
    assert {types.pop(x.name) for x in op.inputs} == {"Tensor"}
    assert all(types.pop(name) == "Optional[Tensor]" for name in masks)
    kinds = {name: "bool" if isinstance(default, bool) else "float" for name, default in op.attributes.items()}
    assert types == {**kinds, "impl": "str"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_function_has_the_signature_of_its_variant(name: str) -> None:
    made, variant = function(name, OLDEST_OPSET), VARIANTS[name]
    assert (made.domain, made.name) == (DOMAIN, name)
    assert list(made.input) == [x.name for x in variant.inputs]
    assert list(made.output) == [x.name for x in variant.outputs]
    assert [x.name for x in made.attribute_proto][: len(variant.attributes)] == list(variant.attributes)
    outputs = [name for node in made.node for name in node.output]
    assert len(outputs) == len(set(outputs))
    assert set(outputs) >= set(made.output)
    read = {name for node in made.node for name in node.input}
    assert read >= set(made.input)


def test_an_unknown_type_of_mask_has_no_variant() -> None:
    with pytest.raises(KeyError):
        OPS["token_moments"].variant(torch.float32)

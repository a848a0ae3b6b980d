"""What models take and return beside tensors by name: nests, positions, constants, dataclasses, caches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from adaattn.errors import ConfigError
from adaattn.export import Options, export
from adaattn.export.capture.captured import tensors_of
from adaattn.export.cli.export import main


class Nested(nn.Module):
    """Adds what is given in a tuple, a list of dictionaries and after a star."""

    def forward(
        self,
        pair: tuple[Tensor, Tensor],
        /,
        *more: Tensor,
        batch: Mapping[str, Any],
        scale: float = 1.0,
        kind: str | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        x = pair[0] - pair[1] * scale
        for y in more:
            x = x * y
        if kind == "twice":
            x = 2 * x
        return x + batch["parts"][0] + batch["rest"] if skip is None else x


NAMES = ("pair.0", "pair.1", "more.0", "batch.parts.0", "batch.rest")


def make() -> nn.Module:
    return Nested().eval()


def test_nested_and_positional_inputs_and_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(("onnx",))
    constants = {"scale": 3, "kind": "twice"}
    result = export(make(), dict.fromkeys(NAMES, "B,4:float32"), tmp_path / "out", constants=constants, options=options)
    assert result.passed
    assert list(result.report["inputs"]) == ["pair_0", "pair_1", "more_0", "batch_parts_0", "batch_rest"]
    assert result.report["model"]["class"] == "Nested"
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    a, b, c, d, e = (np.random.default_rng(i).normal(size=(3, 4)).astype("float32") for i in range(5))
    names = ("pair_0", "pair_1", "more_0", "batch_parts_0", "batch_rest")
    (got,) = session.run(None, dict(zip(names, (a, b, c, d, e), strict=True)))
    np.testing.assert_allclose(got, 2 * (a - 3 * b) * c + d + e, rtol=1e-5, atol=1e-5)

    monkeypatch.chdir(tmp_path)
    inputs = [part for name in NAMES for part in ("--input", f"{name}=B,4:float32")]
    arguments = ["tests.export.capture.test_arguments:make", *inputs, "--set", "scale=3", "--set", "kind=twice"]
    done = CliRunner().invoke(main, [*arguments, "--target", "onnx", "--json", "-o", "other"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] == "passed"


def test_examples_take_the_same_names(tmp_path: Path) -> None:
    given = {name: torch.randn(2, 4) for name in NAMES}
    assert export(make(), given, tmp_path / "out", options=Options(("onnx",))).passed


@pytest.mark.parametrize(
    ("names", "constants", "said"),
    [
        (NAMES[:-3], {}, "the input 'batch' is not described"),
        ((*NAMES, "other"), {}, r"no input 'other'; Nested.forward takes \(pair, \*more, batch, scale, kind, skip\)"),
        ((*NAMES, "scale"), {"scale": 2.0}, "scale is given as an input and as a constant"),
        ((*NAMES, "batch.rest_0", "batch.rest.0"), {}, "have the same name once dots are written as _"),
    ],
)
def test_names_that_do_not_fit(names: tuple[str, ...], constants: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        export(make(), dict.fromkeys(names, "B,4"), tmp_path / "out", constants=constants)


@dataclass
class Data:
    first: Tensor
    second: Any = None
    count: int = 3


class Named(NamedTuple):
    left: Any
    right: Any


class Layer:
    def __init__(self) -> None:
        self.keys, self.values = torch.ones(1), torch.ones(2)


class Cache:
    def __init__(self) -> None:
        self.layers = [Layer(), Layer()]


T = torch.ones(3)
OUTPUTS: dict[str, tuple[Any, list[str], int]] = {
    "tensor": (T, ["output"], 0),
    "tuple with None": ((T, None, T), ["output_0", "output_1"], 0),
    "dataclass": (Data(T, {"a": T, "b": [T, 1.5]}), ["first", "second_a", "second_b_0"], 2),
    "named tuple": (Named(T, (T, T)), ["left", "right_0", "right_1"], 0),
    "a cache": ({"x": T, "past": Cache()}, ["x", *(f"past_{i}_{k}" for i in (0, 1) for k in ("key", "value"))], 0),
    "a name of an input": ({"x_in": T, "y": T}, ["x_in_out", "y"], 0),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_named_by_the_way_to_them(name: str) -> None:
    output, names, left_out = OUTPUTS[name]
    tensors, notes = tensors_of(output, ["x_in"])
    assert list(tensors) == names
    assert len(notes) == left_out


class Returns(nn.Module):
    """Returns a dataclass in a tuple, as no pytree of torch knows it."""

    def forward(self, x: Tensor) -> Any:
        ones = (1.0 - (x > 0).long()) * x  # integers, which torch.onnx would subtract from without a cast
        return Data(x * 2, Named(x + 1, None)), [ones]


def test_outputs_of_any_class_are_exported(tmp_path: Path) -> None:
    result = export(Returns().eval(), {"x": "B,4:float32"}, tmp_path / "out", options=Options(("onnx",)))
    assert result.passed
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    got = session.run(None, {"x": x})
    for found, want in zip(got, (x * 2, x + 1, np.where(x > 0, 0, x)), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-6)

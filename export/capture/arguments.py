"""Call models whose inputs are not tensors by name: nested, positional, or constants."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adaattn.errors import ConfigError
from adaattn.input_spec import InputSpec

Way = tuple[str | int, ...]  # a parameter of forward, then keys and places within it


class WithArguments(nn.Module):
    """A model that is called with tensors by flat names.

    Args:
        model: the model.
        ways: for each flat name the way to the place of the tensor.
        constants: what other parameters of forward get.
    """

    def __init__(self, model: nn.Module, ways: Mapping[str, Way], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.ways, self.constants = model, dict(ways), dict(constants)

    def call(self, tensors: Mapping[str, Tensor]) -> Any:
        """Call the model."""
        given = dict(self.constants)
        for name, (top, *way) in self.ways.items():
            _put(given, [top, *way], tensors[name])
        given = {name: _in_order(x) for name, x in given.items()}
        args: list[Any] = []
        for name, parameter in inspect.signature(self.model.forward).parameters.items():
            if parameter.kind is parameter.POSITIONAL_ONLY and name in given:
                args.append(given.pop(name))
            elif parameter.kind is parameter.VAR_POSITIONAL:
                args += given.pop(name, ())
        return self.model(*args, **given)


def with_arguments(
    model: nn.Module, specs: Sequence[InputSpec], examples: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> tuple[nn.Module, list[InputSpec], dict[str, Tensor]]:
    """Return a model that takes each input by a flat name, and the inputs by these names: `pair.0` is `pair_0`.

    A model that takes all its inputs by name already is returned as it is.

    Raises:
        ConfigError: a name that forward does not have, or that is given twice.
    """
    parameters = inspect.signature(model.forward).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    ways = {spec.name: _way(spec.name) for spec in specs}
    nested = any(len(way) > 1 for way in ways.values())
    positional = any(kinds.get(name) is inspect.Parameter.POSITIONAL_ONLY for name in ways)
    if not (nested or positional or constants):
        return model, list(specs), dict(examples)
    shown = ", ".join(str(parameter).split(":")[0].split("=")[0] for parameter in parameters.values())
    tops = {str(way[0]) for way in ways.values()} | set(constants)
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
    for name in tops:
        if name not in kinds and not takes_any:
            raise ConfigError(f"the model has no input {name!r}; {type(model).__name__}.forward takes ({shown})")
    both = {str(way[0]) for way in ways.values()} & set(constants)
    if both:
        raise ConfigError(f"{', '.join(sorted(both))} is given as an input and as a constant; give it once")
    for name, parameter in parameters.items():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty and name not in tops:
            raise ConfigError(
                f"the input {name!r} is not described; {type(model).__name__}.forward takes ({shown}); describe it "
                "with --input, or give a constant with --set"
            )
    flat = {name: "_".join(map(str, way)) for name, way in ways.items()}
    if len(set(flat.values())) < len(flat):
        raise ConfigError(f"inputs {', '.join(flat)} have the same name once dots are written as _; rename one")
    wrapped = _class_of(flat.values())(model, {flat[name]: way for name, way in ways.items()}, constants)
    return (
        wrapped.train(model.training),
        [replace(spec, name=flat[spec.name]) for spec in specs],
        {flat[name]: x for name, x in examples.items()},
    )


def _class_of(names: Iterable[str]) -> type[WithArguments]:
    """Return a class whose forward has parameters of these names: torch.export reads its signature."""

    def forward(self: WithArguments, **tensors: Tensor) -> Any:
        return self.call(tensors)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    vars(forward)["__signature__"] = signature
    return type("WithArguments", (WithArguments,), {"forward": forward})


def _way(name: str) -> Way:
    first, *rest = name.split(".")
    return (first, *(int(part) if part.isdecimal() else part for part in rest))


def _put(into: dict[Any, Any], way: Sequence[str | int], x: Tensor) -> None:
    for part in way[:-1]:
        into = into.setdefault(part, {})
    into[way[-1]] = x


def _in_order(x: Any) -> Any:
    """Return a dictionary of places as a tuple; others as they are, and so within them."""
    if not isinstance(x, dict):
        return x
    inside = {key: _in_order(value) for key, value in x.items()}
    if inside and all(isinstance(key, int) for key in inside):
        return tuple(inside[key] for key in sorted(inside))
    return inside

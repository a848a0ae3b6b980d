"""Check options. Each function returns the value in plain Python, or raises an error that says what was given.

This module imports no torch, because what it checks for, such as `adaattn.planning.budget`, is used without torch too.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Number, Real
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError


def described(given: object) -> str:
    """Return a value as an error message shows it: a number or a text itself, else its type.

    Example:
        >>> described(None), described([1, 2]), described("much")
        ('None', 'of type list', "'much'")
    """
    if given is None or isinstance(given, (Number, str, bytes)):
        try:
            text = repr(given)
        except ValueError:  # an integer of more digits than Python prints
            return f"a very large {type(given).__name__}"
        return text if len(text) <= 60 else f"{text[:57]}..."
    try:
        form = f", shape {tuple(given.shape)}, {given.dtype}"  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError, TypeError):  # neither an array nor a tensor, or a nested one
        form = ""
    return f"of type {type(given).__name__}{form}"


def as_float(name: str, given: Any, wanted: str, accepts: Callable[[float], bool] = lambda x: True) -> float:
    """Return a number of Python, numpy or a tensor without axes; a bool is not a number.

    Raises:
        ConfigError: something else, or a number that `accepts` refuses (NaN is compared as any other).
    """
    number = given if type(given) is float else _scalar(given)
    # Sizes and what is computed of them are numbers of torch's own in a trace.
    if (isinstance(number, Real) and not isinstance(number, bool)) or type(number).__name__ in ("SymInt", "SymFloat"):
        try:
            number = float(number)
        except OverflowError:
            number = float("inf")
        if accepts(number):
            return number
    raise ConfigError(f"{name} is {described(given)}; give {wanted}")


def as_int(name: str, given: Any, wanted: str, least: int = 1) -> int:
    """Return an integer of at least `least`; a bool is not a number.

    Raises:
        ConfigError: something else, or one that no size of a tensor can be.
    """
    number = given if type(given) is int else _scalar(given)
    if not isinstance(number, bool):
        try:
            number = operator.index(number)
        except TypeError:
            number = least - 1
        if least <= number < 2**63:
            return int(number)
    raise ConfigError(f"{name} is {described(given)}; give {wanted}")


def as_bool(name: str, given: Any) -> bool:
    """Return True or False, of Python or numpy.

    Raises:
        ConfigError: something else.
    """
    flag = given if isinstance(given, bool) else _scalar(given)
    if isinstance(flag, bool):
        return flag
    raise ConfigError(f"{name} is {described(given)}; give True or False")


def as_choice(name: str, given: Any, choices: Collection[str]) -> str:
    """Return one of some names.

    Raises:
        ConfigError: something else.
    """
    if isinstance(given, str) and given in choices:
        return given
    raise ConfigError(f"{name} is {described(given)}; choose one of {', '.join(choices)}")


def as_names(name: str, given: Any, choices: Collection[str]) -> tuple[str, ...]:
    """Return at least one of some names, as a tuple.

    Raises:
        ConfigError: nothing, something else, or a text instead of a sequence of them.
    """
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) and not hasattr(given, "dtype"):
        names = tuple(given)
        if names and all(isinstance(each, str) and each in choices for each in names):
            return names
        found = f"({', '.join(described(each) for each in names[:8])})"
    else:
        found = described(given)
    raise ConfigError(f"{name} are {found}; choose at least one of {', '.join(choices)}")


def as_sequence(name: str, given: Any) -> tuple[Any, ...]:
    """Return what a list, a tuple or another iterable holds.

    Raises:
        ConfigError: a text, a mapping, or what cannot be iterated over.
    """
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)) and not hasattr(given, "dtype"):
        return tuple(given)
    raise ConfigError(f"{name} is {described(given)}; give a tuple")


def as_path(name: str, given: Any) -> Path:
    """Return a path from a text or an object of `os.PathLike`.

    Raises:
        ConfigError: something else.
    """
    if isinstance(given, (str, os.PathLike)) and isinstance(os.fspath(given), str) and "\0" not in os.fspath(given):
        return Path(given)
    raise ConfigError(f"{name} is {described(given)}; give a path")


def check_instance(name: str, given: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise ConfigError where an argument is not of its class."""
    if not isinstance(given, kind):
        raise ConfigError(f"{name} is {described(given)}; give {wanted}")


def check_function(name: str, given: object) -> None:
    """Raise ConfigError where an argument cannot be called."""
    if not callable(given):
        raise ConfigError(f"{name} is {described(given)}; give a function")


def check_mapping(name: str, given: object, kinds: tuple[type, ...], wanted: str) -> None:
    """Raise ConfigError where an argument is not a mapping from texts to values of some classes."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {described(given)}; give a dict with {wanted} for each name")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, kinds):
            raise ConfigError(f"{name} has {described(value)} for {described(key)}; give {wanted} for each name")


def _scalar(given: Any) -> Any:
    """Return the number in a numpy scalar or in an array or tensor without axes; anything else as it is."""
    if getattr(given, "ndim", None) != 0 or not hasattr(given, "item"):
        return given
    try:
        return given.item()
    except RuntimeError:  # a meta tensor holds no number
        return given

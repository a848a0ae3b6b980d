"""Define the interface that all runtimes share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from adaattn.errors import ConfigError
from adaattn.export.artifacts.dtypes import dtype_name

if TYPE_CHECKING:
    import torch

    Value = np.ndarray[Any, Any] | torch.Tensor


Self = TypeVar("Self", bound="Runtime")


@dataclass(frozen=True)
class TensorInfo:
    """An input or output.

    Args:
        dtype: in numpy's words, or "bfloat16", which numpy has no word for.
        shape: sizes; a name or -1 for one that is not fixed.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Timing:
    """How long calls took, in milliseconds, after a warm-up."""

    median: float
    p99: float
    calls: int


class Runtime(ABC):
    """A model that is ready to run; a context manager, which frees it."""

    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]

    def __call__(self, **inputs: Value) -> dict[str, Any]:
        """Run the model and return its outputs by name.

        Raises:
            ConfigError: inputs that the model does not have, or of other types or shapes.
        """
        self._check(inputs)
        return self._run(inputs)

    def measure(self, calls: int = 100, warmup: int = 10, **inputs: Value) -> Timing:
        """Time calls, each to its end.

        Example:
            >>> model.measure(x=x).median  # doctest: +SKIP
            0.82
        """
        if calls < 1:
            raise ConfigError(f"calls is {calls}; give 1 or more")
        self._check(inputs)
        taken = []
        for number in range(warmup + calls):
            start = time.perf_counter()
            self._run(inputs)
            self._wait()
            if number >= warmup:
                taken.append(1e3 * (time.perf_counter() - start))
        return Timing(float(np.median(taken)), float(np.quantile(taken, 0.99)), calls)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Value]) -> dict[str, Any]: ...

    @abstractmethod
    def _wait(self) -> None:
        """Wait until the device has finished its work."""

    @abstractmethod
    def close(self) -> None:
        """Free the model."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, inputs: Mapping[str, Value]) -> None:
        takes = "; the model takes " + ", ".join(map(str, self.inputs.values()))
        for name in inputs:
            if name not in self.inputs:
                raise ConfigError(f"there is no input {name!r}{takes}")
        for name, info in self.inputs.items():
            if name not in inputs:
                raise ConfigError(f"the input {name!r} is missing{takes}")
            dtype, shape = dtype_name(inputs[name].dtype), tuple(inputs[name].shape)
            fits = len(shape) == len(info.shape) and all(
                want == got or isinstance(want, str) or want < 0 for want, got in zip(info.shape, shape, strict=True)
            )
            if dtype != info.dtype or not fits:
                raise ConfigError(f"{name} is {dtype}({', '.join(map(str, shape))}); expected {info}")

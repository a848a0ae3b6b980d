"""How a model's inputs are written down: `B,S,512:float32`, and the sizes that B and S may take: `1:128:4096`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adaattn.errors import ConfigError

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension: its name, and the sizes it may take.

    Example:
        >>> Dimension.parse("S", "1:128:4096")
        Dimension(name='S', min=1, opt=128, max=4096)

    Raises:
        ConfigError: sizes that are no numbers, or not in order.
    """

    name: str
    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, name: str, sizes: str) -> Dimension:
        parts = sizes.split(":")
        if not name.isidentifier() or len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(f"dimension {name}={sizes}; write NAME=min:opt:max, such as S=1:128:4096")
        return cls(name, *(int(part) for part in parts))

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max <= INT_MAX or not self.max:
            raise ConfigError(f"dimension {self.name}={self}; sizes must be in order, 0 ≤ min ≤ opt ≤ max ≤ {INT_MAX}")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @property
    def is_batch(self) -> bool:
        """Whether it is named like one: B… or N…"""
        return self.name[0] in "BNbn"


@dataclass(frozen=True)
class InputSpec:
    """One input: name, shape (a name for each dynamic dimension), type, and for integers the values it may take.

    Example:
        >>> InputSpec.parse("ids", "B,S:int64<30522")
        InputSpec(name='ids', shape=('B', 'S'), dtype='int64', below=30522)

    Raises:
        ConfigError: a text that is no specification.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str | None = None  # None: the model's own
    below: int | None = None  # integers lie in [0, below)

    @classmethod
    def parse(cls, name: str, text: str) -> InputSpec:
        match = re.fullmatch(r"([^:<]*)(?:: *(\w+) *)?(?:< *(\d+))?", text.strip())
        if not name.isidentifier() or match is None:
            raise ConfigError(f"input {name}={text}; write NAME=SHAPE[:TYPE], such as query=B,S,512:float32")
        shape: list[int | str] = []
        for size in map(str.strip, match[1].split(",") if match[1].strip() else ()):
            if not size.isdecimal() and not size.isidentifier():
                raise ConfigError(f"input {name}={text}: {size!r} is neither a size nor a name such as S")
            if size.isdecimal() and not 1 <= int(size) <= INT_MAX:
                raise ConfigError(f"input {name}={text}: a size is {size}; sizes are 1 to {INT_MAX}")
            shape.append(int(size) if size.isdecimal() else size)
        dtype, below = match[2], match[3]
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"input {name}={text}: type {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if below is not None and (dtype not in ("int64", "int32") or int(below) < 1):
            raise ConfigError(f"input {name}={text}: '<{below}' needs an integer type and at least 1")
        return cls(name, tuple(shape), dtype, None if below is None else int(below))

    def __str__(self) -> str:
        text = ",".join(str(size) for size in self.shape)
        if self.dtype is not None:
            text += f":{self.dtype}"
        return text if self.below is None else f"{text}<{self.below}"


def default_dimension(name: str) -> Dimension:
    """Sizes of a dimension that nobody described: a batch (B…, N…) of 1 to 8, anything else 1 to 512."""
    usual = Dimension(name, 1, 128, 512)
    return Dimension(name, 1, 1, 8) if usual.is_batch else usual

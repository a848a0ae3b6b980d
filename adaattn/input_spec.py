"""Parse a model's inputs, `B,S,512:float32`, and the sizes of dimensions, `1:128:4096`.

A specification may also say what an input means to the model, as in `B,S:bool:masked`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adaattn.errors import ConfigError

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")
# What the values of an input mean to the model.
MEANINGS = {
    "attend": "true or 1 where the model attends",
    "masked": "true or 1 where the model does not attend",
    "bias": "numbers that are added to the scores, -inf among them",
    "values": "values like those of any other input",
}
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
        """Parse "min:opt:max"."""
        parts = sizes.split(":")
        if not name.isidentifier() or len(parts) != 3 or not all(_is_number(part.strip()) for part in parts):
            raise ConfigError(f"dimension {name}={sizes}; write NAME=min:opt:max, such as S=1:128:4096")
        return cls(name, *(int(part) for part in parts))

    @classmethod
    def of(cls, name: str, given: str | Dimension) -> Dimension:
        """Return a dimension as it is, or parse its sizes."""
        return given if isinstance(given, Dimension) else cls.parse(name, given)

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max <= INT_MAX or not self.max:
            raise ConfigError(f"dimension {self.name}={self}; sizes must be in order, 0 ≤ min ≤ opt ≤ max ≤ {INT_MAX}")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @property
    def is_batch(self) -> bool:
        """Whether it is a batch, by its name, which begins with B or N."""
        return self.name[0] in "BNbn"


@dataclass(frozen=True)
class InputSpec:
    """One input: name, shape (a name for each dynamic dimension), type, for integers the values it may take, meaning.

    Example:
        >>> InputSpec.parse("ids", "B,S:int64<30522")
        InputSpec(name='ids', shape=('B', 'S'), dtype='int64', below=30522, meaning=None)
        >>> InputSpec.parse("padding", "B,S:bool:masked").meaning
        'masked'

    Raises:
        ConfigError: a text that is not a specification.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str | None = None  # None: the model's own
    below: int | None = None  # integers lie in [0, below)
    meaning: str | None = None  # of MEANINGS; None: found by trying

    @classmethod
    def parse(cls, name: str, text: str) -> InputSpec:
        """Parse SHAPE[:TYPE[<LIMIT]][:MEANING]."""
        match = re.fullmatch(r"([^:<]*)(?:: *(\w*) *)?(?:< *(\d{1,100}) *)?(?:: *(\w+) *)?", text.strip())
        named = re.fullmatch(r"[^\W\d]\w*(\.\w+)*", name)
        if named is None or match is None or (match[2] == "" and match[4] is None):
            raise ConfigError(f"input {name}={text}; write NAME=SHAPE[:TYPE[:MEANING]], such as query=B,S,512:float32")
        shape: list[int | str] = []
        for size in map(str.strip, match[1].split(",") if match[1].strip() else ()):
            if not _is_number(size) and not size.isidentifier():
                raise ConfigError(f"input {name}={text}: {size!r} is neither a size nor a name such as S")
            if size.isdecimal() and not 1 <= int(size) <= INT_MAX:
                raise ConfigError(f"input {name}={text}: a size is {size}; sizes are 1 to {INT_MAX}")
            shape.append(int(size) if size.isdecimal() else size)
        dtype, below, meaning = match[2] or None, match[3], match[4]
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"input {name}={text}: type {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if below is not None and (dtype not in ("int64", "int32") or int(below) < 1):
            raise ConfigError(f"input {name}={text}: '<{below}' needs an integer type and at least 1")
        return cls(name, tuple(shape), dtype, None if below is None else int(below), meaning)

    def __post_init__(self) -> None:
        if self.meaning is None:
            return
        if self.meaning not in MEANINGS:
            raise ConfigError(
                f"input {self.name}={self}: meaning {self.meaning!r} is unknown; choose one of {', '.join(MEANINGS)}"
            )
        if self.meaning == "bias" and self.dtype is not None and "float" not in self.dtype:
            raise ConfigError(f"input {self.name}={self}: a bias is added to scores; it needs a floating-point type")
        if self.meaning in ("attend", "masked") and self.below not in (None, 2):
            raise ConfigError(f"input {self.name}={self}: a mask of integers has 0 and 1; leave out '<{self.below}'")

    def __str__(self) -> str:
        text = ",".join(str(size) for size in self.shape)
        if self.dtype is not None or self.meaning is not None:
            text += f":{self.dtype or ''}"
        if self.below is not None:
            text += f"<{self.below}"
        return text if self.meaning is None else f"{text}:{self.meaning}"


def _is_number(text: str) -> bool:
    """Return whether a text is a number that a size could have; Python refuses to read those of thousands of digits."""
    return text.isdecimal() and len(text) <= 100


def default_dimension(name: str) -> Dimension:
    """Return the default sizes of a dimension: a batch (B…, N…) of 1 to 8, anything else 1 to 512."""
    usual = Dimension(name, 1, 128, 512)
    return Dimension(name, 1, 1, 8) if usual.is_batch else usual

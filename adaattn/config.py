"""Options that more than one place reads: the precisions, the named tolerances and the error budget."""

from __future__ import annotations

from dataclasses import dataclass

from adaattn.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8_fp8")
"""Names of the precisions; the position of a name is the code that tensors carry."""

FP32, BF16, FP16, INT8, INT8_FP8 = range(5)

POLICIES = {"quality": 1e-3, "balanced": 1e-2, "speed": 5e-2}
"""Named tolerances: the accepted relative error of the attention output."""


@dataclass(frozen=True)
class Budget:
    """What a plan may spend.

    Args:
        tolerance: accepted relative error (root mean square) of the attention output of a head, above 0.
        safety: the predicted error times this must fit the tolerance.
        precisions: what the target allows; the most precise of them is the fallback.
        low_rank: whether the rank may be cut.

    Example:
        >>> Budget(tolerance=1e-2).limit
        0.008

    Raises:
        ConfigError: a value is out of range or a precision is unknown.
    """

    tolerance: float
    safety: float = 1.25
    precisions: tuple[str, ...] = PRECISIONS
    low_rank: bool = True

    def __post_init__(self) -> None:
        for name, wanted in (
            ("tolerance", "a relative error above 0, such as 1e-2"),
            ("safety", "a factor above 0, usually 1 to 2"),
        ):
            given = getattr(self, name)
            try:
                number = float(given)  # of numpy's and torch's numbers, too
            except (TypeError, ValueError):
                number = 0.0
            if not 0 < number < float("inf"):
                raise ConfigError(f"{name} is {given!r}; give {wanted}")
            object.__setattr__(self, name, number)
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown or not self.precisions:
            raise ConfigError(f"precisions are {self.precisions!r}; choose at least one of {', '.join(PRECISIONS)}")

    @property
    def limit(self) -> float:
        """Largest predicted error that is accepted."""
        return self.tolerance / self.safety


def resolve_tolerance(tolerance: float | None, policy: str | None) -> float | None:
    """The tolerance that a pair of `tolerance` and `policy` arguments asks for, or None where neither is given.

    Example:
        >>> resolve_tolerance(None, "balanced")
        0.01

    Raises:
        ConfigError: both are given, or the policy is unknown.
    """
    if policy is None:
        return tolerance
    if tolerance is not None:
        raise ConfigError(f"both tolerance={tolerance!r} and policy={policy!r} are given; a policy names a tolerance")
    if policy not in POLICIES:
        raise ConfigError(f"policy is {policy!r}; choose one of {', '.join(POLICIES)}, or give tolerance")
    return POLICIES[policy]

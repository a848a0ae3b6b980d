"""Define the named tolerances and the error budget."""

from __future__ import annotations

from dataclasses import dataclass

from adaattn.checks import as_bool, as_choice, as_float, as_names
from adaattn.errors import ConfigError
from adaattn.planning.precision import PRECISIONS

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
        object.__setattr__(self, "tolerance", as_tolerance(self.tolerance))
        wanted = "a factor above 0, usually 1 to 2"
        object.__setattr__(self, "safety", as_float("safety", self.safety, wanted, lambda x: 0 < x < float("inf")))
        object.__setattr__(self, "precisions", as_names("precisions", self.precisions, PRECISIONS))
        object.__setattr__(self, "low_rank", as_bool("low_rank", self.low_rank))

    @property
    def limit(self) -> float:
        """Largest predicted error that is accepted."""
        return self.tolerance / self.safety


def as_tolerance(tolerance: float, name: str = "tolerance") -> float:
    """Return an accepted relative error as a float.

    Args:
        name: of the argument, for errors.

    Raises:
        ConfigError: it is not a number above 0.
    """
    wanted = "a relative error above 0, such as 1e-2"
    return as_float(name, tolerance, wanted, lambda x: 0 < x < float("inf"))


def resolve_tolerance(tolerance: float | None, policy: str | None) -> float | None:
    """Return the tolerance that a pair of `tolerance` and `policy` arguments asks for, or None where neither is given.

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
    return POLICIES[as_choice("policy", policy, POLICIES)]

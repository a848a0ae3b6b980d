"""Describe an allocation: the type of each site, what was predicted and measured, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError
from adaattn.export.allocation.heads import PlannedHeads
from adaattn.export.formats import FORMATS, PLUGIN
from adaattn.system.atomic_file import replacing

VERSION = 2


@dataclass(frozen=True)
class AllocatedSite:
    """One operator and its type.

    Args:
        name: of the node in the program.
        path: of its module.
        op: the operator.
        format: that it has.
        product: whether it is attention, a product or a convolution.
        errors: for each format the relative error that was measured at the site; infinite where numbers overflow.
        sensitivity: relative error of the model's output for one of the site's.
        share: of the predicted error's square.
        flops: operations of its products in the largest sample.
        scales: of its quantized operands.
        heads: the plans of its heads, where it is attention that becomes the op `adaptive_attention`.
    """

    name: str
    path: str
    op: str
    format: str
    product: bool
    errors: Mapping[str, float]
    sensitivity: float
    share: float
    flops: float
    scales: tuple[float, ...] = ()
    heads: PlannedHeads | None = None


@dataclass(frozen=True)
class Allocation:
    """A type for each operator of a program, and what it was chosen by.

    Args:
        tolerance: accepted relative error of each output, or of the metric.
        quantile: the share of samples that must keep it.
        metric: the name of the user's measure; None for the relative error.
        device: whose times were weighed.
        predicted: relative error of the output, Σ A²e² under a root.
        certified: the error of each certifying sample with all roundings.
        measured: their quantile.
        cost, cost_fp32: seconds in the model of the device, of this plan and of float32 everywhere.
        casts: how many the plan needs.
    """

    tolerance: float
    quantile: float
    metric: str | None
    device: str
    sites: tuple[AllocatedSite, ...]
    predicted: float
    certified: tuple[float, ...]
    measured: float
    cost: float
    cost_fp32: float
    casts: int

    @property
    def plan(self) -> dict[str, str]:
        """The format of each site by its name."""
        return {site.name: site.format for site in self.sites}

    @property
    def constants(self) -> dict[str, Sequence[float] | PlannedHeads]:
        """The scales of each quantized site, and what heads are planned by."""
        return {site.name: site.heads or site.scales for site in self.sites if site.heads or site.scales}

    @property
    def promises(self) -> bool:
        """Whether there were enough certifying samples for the quantile to hold on new ones."""
        return math.ceil((len(self.certified) + 1) * self.quantile) <= len(self.certified)

    def work(self) -> dict[str, float]:
        """Return the share of the products' operations that each format has, largest first."""
        total = sum(site.flops for site in self.sites) or 1.0
        found: dict[str, float] = {}
        for site in self.sites:
            found[site.format] = found.get(site.format, 0.0) + site.flops / total
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the allocation as JSON; an infinite error is null."""
        with replacing(Path(path)) as out:
            out.write((json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n").encode())

    def as_json(self) -> dict[str, Any]:
        """Return what `save` writes."""
        found = {"version": VERSION, **asdict(self)}
        found["certified"] = [x if math.isfinite(x) else None for x in self.certified]
        for site in found["sites"]:
            site["errors"] = {form: x if math.isfinite(x) else None for form, x in site["errors"].items()}
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Allocation:
        """Read what `save` wrote.

        Raises:
            ConfigError: there is no such file, or it holds no allocation of this version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("version") != VERSION:
                raise ConfigError(f"{path} is an allocation of another version; make it again")
            sites = tuple(_site(each) for each in content.pop("sites"))
            content["certified"] = tuple(math.inf if x is None else float(x) for x in content["certified"])
            return cls(sites=sites, **content)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} holds no allocation: {type(error).__name__}: {error}") from error


def _site(content: dict[str, Any]) -> AllocatedSite:
    if set(content) - {field.name for field in fields(AllocatedSite)} or content["format"] not in FORMATS:
        raise ValueError(f"the site {content.get('name')}")
    errors = {form: math.inf if x is None else float(x) for form, x in content["errors"].items()}
    heads = None if content["heads"] is None else PlannedHeads.from_json(content["heads"])
    if (heads is not None) != (content["format"] == PLUGIN):
        raise ValueError(f"the heads of {content['name']}")
    scales = tuple(map(float, content["scales"]))
    return AllocatedSite(**{**content, "errors": errors, "scales": scales, "heads": heads})

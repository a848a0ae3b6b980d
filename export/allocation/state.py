"""Keep what an allocation has measured in a file, so that an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adaattn.errors import ConfigError
from adaattn.export.allocation.measure import Measurements
from adaattn.export.allocation.sites import Network
from adaattn.system.atomic_file import replacing


class State:
    """The file of an allocation's measurements.

    Args:
        path: of the file; None keeps nothing.
        network, samples: what is measured, which the file must be of.

    Raises:
        ConfigError: the file is of another model, other samples or formats, or damaged.
    """

    def __init__(self, path: Path | None, network: Network, samples: Sequence[Mapping[str, Tensor]]) -> None:
        self._path, self.done = path, 0
        self.sites: dict[str, Any] = {}
        if path is None:
            return
        self._of = _fingerprint(network, samples)
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            of, self.done, self.sites = content["of"], int(content["done"]), dict(content["sites"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no state of an allocation: {error}; delete it to begin anew") from error
        if of != self._of:
            raise ConfigError(f"{path} is of another model, other samples or other formats; delete it to begin anew")

    def save(self, done: int, measured: Measurements) -> None:
        """Write the measurements after so many steps."""
        if self._path is not None:
            sites = {name: found.as_json() for name, found in measured.sites.items()}
            with replacing(self._path) as out:
                out.write(json.dumps({"of": self._of, "done": done, "sites": sites}).encode())


def _fingerprint(network: Network, samples: Sequence[Mapping[str, Tensor]]) -> str:
    """Return a digest of the sites, the weights and the samples."""
    digest = hashlib.sha256()
    digest.update(repr([(site.name, site.op, site.candidates) for site in network.sites.values()]).encode())
    for x in [*network.program.state_dict.values(), *(x for sample in samples for x in sample.values())]:
        digest.update(str((tuple(x.shape), x.dtype)).encode())
        digest.update(x.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Ask the system how much memory is free."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int | None:
    """Return the bytes that a process can still take; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None

"""Ask the CUDA driver of this machine for its version and GPU, without torch."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@functools.cache
def _driver() -> Any:
    """Load the driver's library; None where there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return library if library.cuInit(0) == 0 else None
    return None


def capability(device: int = 0) -> int | None:
    """Return the architecture of a GPU, 90 for compute capability 9.0; None without one."""
    driver = _driver()
    if driver is None:
        return None
    found, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    asked = (
        driver.cuDeviceGet(ctypes.byref(found), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, found),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, found),
    )
    return None if any(asked) else 10 * major.value + minor.value


def cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver takes, (12, 8) for 12.8; None without a driver that finds a GPU."""
    driver, found = _driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(found)):
        return None
    return found.value // 1000, found.value % 1000 // 10


def ptx_version() -> int | None:
    """Return the newest PTX that the driver takes, 84 for 8.4; None without a driver."""
    cuda = cuda_version()
    if cuda is None:
        return None
    major, minor = cuda
    if major >= 13:
        return 90 + 10 * (major - 13) + minor
    # From CUDA's release notes: 12.5 and 12.6 both brought PTX 8.5.
    return 80 + minor - (minor >= 6) if major == 12 else 70 + minor

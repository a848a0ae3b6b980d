"""Choose the implementation of an op: `impl` is "auto", "reference" or "triton", and only "auto" chooses."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from adaattn.checks import as_choice
from adaattn.errors import ConfigError

IMPLEMENTATIONS = ("auto", "reference", "triton")
LARGEST_HEAD_DIM = 256
OLDEST_ARCHITECTURE = 80


def takes_triton(impl: str, x: Tensor) -> bool:
    """Return whether the fused kernels run on a tensor (B, H, S, D), for `impl` as a caller gave it.

    Example:
        >>> takes_triton("auto", torch.zeros(1, 1, 1, 64))
        False

    Raises:
        ConfigError: no such implementation, or an explicit "triton" where it cannot run.
    """
    as_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "reference":
        return False
    obstacle = _obstacle(x, interpreted=impl == "triton")
    if obstacle is None:
        return True
    if impl == "triton":
        raise ConfigError(f"impl='triton' cannot run here: {obstacle}; impl='auto' computes without it")
    return False


def _obstacle(x: Tensor, interpreted: bool) -> str | None:
    """Return why the kernels cannot run on x, or None. "auto" never chooses Triton's interpreter."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    if x.shape[-1] > LARGEST_HEAD_DIM:
        return f"it takes a head_dim up to {LARGEST_HEAD_DIM}, not {x.shape[-1]}"
    if x.device.type == "cuda":
        return _missing_on(x.device)
    if not interpreted:
        return f"it runs on CUDA devices, not on {x.device.type}"
    if x.device.type != "cpu" or not _installed():
        return f"it runs on CUDA devices with triton installed, not on {x.device.type}"
    import triton

    if not triton.knobs.runtime.interpret:
        return "it runs on CUDA devices, and on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    return None


@functools.cache
def _missing_on(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None:
        return "it is written for NVIDIA GPUs"
    if 10 * major + minor < OLDEST_ARCHITECTURE:
        return f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
    if not _installed():
        # Not a choice anybody made, and some hundred times slower: say so, once a device.
        warnings.warn(
            "triton is not installed: on the GPU AdaAttn makes its plans by torch, slowly. pip install triton",
            stacklevel=2,
        )
        return "triton is not installed (pip install triton)"
    return None


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None

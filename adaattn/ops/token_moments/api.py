"""Check the arguments of `adaattn::token_moments`."""

from __future__ import annotations

from torch import Tensor

from adaattn.checks import as_bool, as_choice
from adaattn.errors import ShapeError
from adaattn.ops.dispatch import IMPLEMENTATIONS
from adaattn.ops.token_moments.ops import token_moments as op
from adaattn.planning.error_model import Moments
from adaattn.tensor_checks import check_device, check_float, check_mask, check_tensor


def token_moments(x: Tensor, key_mask: Tensor | None = None, center: bool = False, *, impl: str = "auto") -> Moments:
    """Compute mean, second moment and peaks of x over its tokens, in one pass.

    Args:
        x: (B, H, S, D), floating point.
        key_mask: boolean, broadcastable to (B, H, S); tokens where it is False do not count.
        center: whether second moment and peaks are about the mean.
        impl: "auto" (Triton on CUDA, else the reference), "reference" or "triton".

    Returns:
        `mean`, `second_moment`, `channel_peak` (largest magnitude of a dimension), each (B, H, D), and `token_peak`
        (B, H), the mean over tokens of a token's squared largest magnitude; float32 (float64 for a float64 x). All
        are zero where no token counts.

    Example:
        >>> token_moments(torch.tensor([[[[1.0, 0.0], [3.0, 0.0]]]])).mean
        tensor([[[2., 0.]]])

    Raises:
        ShapeError: x is not 4-dimensional, or the mask does not fit it.
        DtypeError: x is not floating point, or the mask not boolean.
        DeviceError: the mask is on another device.
        ConfigError: an unknown `impl`, or "triton" where it cannot run.
    """
    check_tensor("x", x)
    if x.dim() != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, heads, tokens, head_dim)")
    check_float("x", x)
    if key_mask is not None:
        shape = dict(zip(("batch", "heads", "tokens"), x.shape, strict=False))
        check_mask("key_mask", key_mask, shape, true="counts", additive=False)
        check_device("key_mask", key_mask, x.device, "x")
    as_choice("impl", impl, IMPLEMENTATIONS)
    return Moments(*op(x, key_mask, as_bool("center", center), impl))

"""Define the formats that a compile-time plan chooses from, how each rounds, and what each costs on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaattn.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """One format of numbers.

    Args:
        dtype: of the numbers that are stored.
        largest: its largest finite number.
        carrier: the format of results, and of operands that are not quantized.
    """

    name: str
    dtype: torch.dtype
    largest: float
    carrier: str

    @property
    def quantized(self) -> bool:
        """Whether operands are scaled and rounded by QuantizeLinear, and not by a cast."""
        return self.name == FP8


FP32, BF16, FP16, FP8, INT8, PLUGIN = "fp32", "bf16", "fp16", "fp8", "int8", "plugin"
TYPES = (FP32, BF16, FP16, FP8)
"""What a user may allow."""
FORMATS = {
    FP32: Format(FP32, torch.float32, torch.finfo(torch.float32).max, FP32),
    BF16: Format(BF16, torch.bfloat16, torch.finfo(torch.bfloat16).max, BF16),
    FP16: Format(FP16, torch.float16, 65504.0, FP16),
    FP8: Format(FP8, torch.float8_e4m3fn, 448.0, FP16),
    PLUGIN: Format(PLUGIN, torch.float16, 65504.0, FP16),  # attention whose heads have a plan each
}
HEADROOM = 4  # numbers of samples stay this factor under a format's largest: other inputs may have larger ones
LEAST_EXPONENT = -15  # of a scale: products of fp8 numbers with smaller ones are below what fp16 holds
PROBABILITY_SCALE = 2.0**-8  # of softmax weights in fp8: the least power of two with which 1 does not exceed 448


def rounded(x: Tensor, name: str) -> Tensor:
    """Return numbers rounded to a format that is not quantized, in their own type."""
    return x.to(FORMATS[name].dtype).to(x.dtype)


def stored(number: float, name: str) -> float:
    """Return a number as the carrier of a format has it.

    Example:
        >>> stored(0.1, "fp16")
        0.0999755859375
    """
    return float(rounded(torch.tensor(number, dtype=torch.float64), FORMATS[name].carrier))


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    """Return numbers rounded to fp8 as QuantizeLinear and DequantizeLinear do, in their own type.

    Args:
        scale: by which numbers are divided first; one, or one for each index of a dimension.
    """
    form = FORMATS[FP8]
    steps = (x / scale).clamp(-form.largest, form.largest)
    return steps.to(torch.float32).to(form.dtype).to(x.dtype) * scale


def scale_of(peak: float) -> float:
    """Return the scale of fp8 for numbers up to a peak: a power of two, by which nothing more is rounded.

    Example:
        >>> scale_of(448.0), scale_of(449.0)
        (1.0, 2.0)
    """
    if not peak > 0:
        return 1.0
    return 2.0 ** max(LEAST_EXPONENT, math.ceil(math.log2(peak / FORMATS[FP8].largest)))


@dataclass(frozen=True)
class Device:
    """What a GPU computes and moves in a second: products of dense tensor cores in TFLOP/s, memory in GB/s.

    fp32 is that of CUDA cores: TF32 is no fp32. 0 where the GPU lacks a format.
    """

    name: str
    fp32: float
    bf16: float
    fp16: float
    fp8: float
    int8: float
    memory: float

    def seconds(self, flops: float, read: float, written: float, name: str) -> float:
        """Return the time of an operator at a format.

        Args:
            flops: floating-point operations of its products.
            read, written: how many numbers it reads, in the format, and writes, in the carrier.
        """
        rate: float = getattr(self, name)
        form = FORMATS[name]
        moved = read * form.dtype.itemsize + written * FORMATS[form.carrier].dtype.itemsize
        return flops / rate / 1e12 + moved / self.memory / 1e9

    def cast(self, size: float, one: str, other: str) -> float:
        """Return the time of a cast between the carriers of two formats: one reading and one writing."""
        if one == other:
            return 0.0
        width = sum(FORMATS[name].dtype.itemsize for name in (one, other))
        return size * width / self.memory / 1e9


# NVIDIA's data sheets of one GPU of each compute capability: T4, A100 SXM 80 GB, A10, L4, H100 SXM, B200, RTX 5090.
DEVICES = {
    "7.5": Device("T4", 8.1, 0.0, 65.0, 0.0, 130.0, 320.0),
    "8.0": Device("A100", 19.5, 312.0, 312.0, 0.0, 624.0, 2039.0),
    "8.6": Device("A10", 31.2, 125.0, 125.0, 0.0, 250.0, 600.0),
    "8.9": Device("L4", 30.3, 121.0, 121.0, 242.0, 242.0, 300.0),
    "9.0": Device("H100", 67.0, 989.0, 989.0, 1979.0, 1979.0, 3350.0),
    "10.0": Device("B200", 75.0, 2250.0, 2250.0, 4500.0, 4500.0, 8000.0),
    "12.0": Device("RTX 5090", 104.8, 209.5, 209.5, 419.0, 838.0, 1792.0),
}
USUAL = "8.0"  # where no compute capability is given: it has bf16 and fp16


def device_of(capabilities: Sequence[str]) -> Device:
    """Return the slowest device of some compute capabilities, which has only the formats that all of them have.

    Raises:
        ConfigError: a compute capability that no entry is for.
    """
    unknown = [each for each in capabilities if each not in DEVICES]
    if unknown:
        raise ConfigError(
            f"what formats cost on compute capability {unknown[0]} is not known; choose one of {', '.join(DEVICES)}"
        )
    chosen = [DEVICES[each] for each in capabilities or (USUAL,)]
    rates = {name: min(getattr(each, name) for each in chosen) for name in (*TYPES, INT8, "memory")}
    return Device(" and ".join(each.name for each in chosen), **rates)


def formats_of(device: Device, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the formats that a plan may use, fp32 always among them.

    Args:
        wanted: what the user allows; None for all that the device has.

    Raises:
        ConfigError: a format that the device lacks.
    """
    lacking = [name for name in wanted or () if not getattr(device, name)]
    if lacking:
        raise ConfigError(f"{device.name} has no {lacking[0]}; leave it out of --formats")
    return tuple(name for name in TYPES if getattr(device, name) and (wanted is None or name in wanted or name == FP32))

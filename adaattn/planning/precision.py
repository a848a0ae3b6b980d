"""Define the precisions: their names, codes, rounding errors and cost."""

from __future__ import annotations

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8_fp8")
"""Names of the precisions; the position of a name is the code that tensors carry."""

FP32, BF16, FP16, INT8, INT8_FP8 = range(5)

RMS = 0.42  # rms of a rounding error, in units of the largest possible: averaged over a mantissa's range
FP32_U, BF16_U, FP16_U, FP8_U = (RMS * 2.0**-bits for bits in (21, 8, 11, 4))  # fp32's sums err 2³ times its operands
FP16_STEP = 2.0**-24  # spacing of fp16's subnormal numbers
FP8_STEP = 2.0**-9 / 448  # the same of fp8-e4m3, relative to the peak that is scaled to 448
FP16_MAX, BF16_MAX = 65504.0, 3.3895e38

# Tensor-core time of q·k and of P·v, fp16 being 2: fp32 is three tf32 products at half the rate, 8 bits run at twice.
COST = {"fp32": (12, 12), "bf16": (2, 2), "fp16": (2, 2), "int8": (1, 2), "int8_fp8": (1, 1)}
# Of equally cheap precisions the first is taken; the first that is allowed is also the fallback, at full rank.
BY_ACCURACY = ("fp32", "fp16", "bf16", "int8", "int8_fp8")

"""Calibrate adaptive-rank attention: give queries and keys a basis in which their energy needs fewer dimensions."""

from adaattn.calibration.procedure import Calibration, Spectrum, calibrate

__all__ = ["Calibration", "Spectrum", "calibrate"]

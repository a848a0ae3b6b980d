"""TODO adaattn/calibration."""

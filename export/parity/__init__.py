"""TODO export/parity."""

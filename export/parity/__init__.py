"""Decide by the parity rule whether an artifact agrees with eager PyTorch. Nothing here needs torch."""

"""The parity rule: when an artifact agrees with eager PyTorch. Nothing here needs torch."""

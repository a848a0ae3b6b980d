"""Compute what is right: golden cases with float64 outputs, from eager PyTorch."""

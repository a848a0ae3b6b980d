"""Capture a model with torch.export, with names and sizes for its dimensions."""

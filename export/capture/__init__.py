"""TODO export/capture."""

"""TODO export/serving."""

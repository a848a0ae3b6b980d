"""TODO export/runtime."""

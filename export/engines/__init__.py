"""TODO export/engines."""

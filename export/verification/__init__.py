"""TODO export/verification."""

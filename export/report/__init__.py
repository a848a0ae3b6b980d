"""TODO export/report."""

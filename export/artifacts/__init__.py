"""TODO export/artifacts."""

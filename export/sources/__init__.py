"""TODO export/sources."""

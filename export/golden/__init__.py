"""TODO export/golden."""

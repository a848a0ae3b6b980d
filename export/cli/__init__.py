"""TODO export/cli."""

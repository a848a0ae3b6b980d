"""Run the artifacts of an export and compare them with its golden cases. Nothing here needs torch."""

"""The choice of a plan as one node of an exported program."""

"""The choice of a plan as one op."""

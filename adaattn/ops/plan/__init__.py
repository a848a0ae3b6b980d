"""Choose the plan of each head as one op."""

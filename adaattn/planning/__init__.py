"""TODO adaattn/planning."""

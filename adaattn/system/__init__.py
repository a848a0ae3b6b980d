"""TODO adaattn/system."""

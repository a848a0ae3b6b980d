"""Find the attention in a captured program, whoever wrote it, and replace it by one op; each replacement is proven."""

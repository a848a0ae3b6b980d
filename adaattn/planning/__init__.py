"""Plan precision and rank within an error budget: precisions, budget, error model, ladder, rank rules."""

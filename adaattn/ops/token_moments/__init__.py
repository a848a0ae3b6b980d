"""Compute moments and peaks of a tensor over its tokens, from which the error model predicts."""

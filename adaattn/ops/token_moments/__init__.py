"""Moments and peaks of a tensor over its tokens: all that the error model asks of q, k and v."""

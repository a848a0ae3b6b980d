"""The attention modules."""

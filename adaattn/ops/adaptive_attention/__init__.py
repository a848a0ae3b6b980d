"""Compute attention whose heads each follow a plan: a precision and a rank."""

"""Tests, in the folders of what they test. `support` has what several share."""

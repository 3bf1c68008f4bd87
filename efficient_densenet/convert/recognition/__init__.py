"""Finds in a recorded forward pass what can recompute, and describes it as plain data."""

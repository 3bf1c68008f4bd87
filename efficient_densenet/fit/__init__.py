"""The fastest mix of modes that fits a budget: which modules recompute, and how much."""

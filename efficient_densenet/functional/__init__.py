"""The recomputing functions on tensors: what is computed, kept and recomputed."""

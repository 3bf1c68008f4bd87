"""The operations that the recomputing functions are written against."""

"""The operations that the passes are written against, and their implementations."""

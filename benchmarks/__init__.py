"""Time and memory of dense blocks and networks: ``pytest benchmarks/ --benchmark-only``."""

"""Memory of a training step: measured, metered, estimated, and held to a budget."""

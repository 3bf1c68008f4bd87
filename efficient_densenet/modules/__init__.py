"""The modules: read as specifications, run through the recomputing functions, or naive."""

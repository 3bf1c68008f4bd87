"""What Python may decide by in a module: compared at every call, to know what still holds."""

"""The decoder, its configuration, and its checkpoints."""

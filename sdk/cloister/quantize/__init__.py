"""From a checkpoint to one with 4-bit or 8-bit weights."""

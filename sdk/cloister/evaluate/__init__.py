"""What a model lost: divergence from another, in numbers with their spread."""

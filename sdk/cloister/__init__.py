"""Private language models on the device."""

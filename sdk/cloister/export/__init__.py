"""From a quantized checkpoint to an ExecuTorch program in a bundle."""

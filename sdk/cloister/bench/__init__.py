"""Benchmarks: what making and running a bundle takes on this machine, and beside its peers."""

from cloister.bench.measured import measure, profile, profile_shape, shape
from cloister.bench.weights import random_checkpoint

__all__ = ["measure", "profile", "profile_shape", "random_checkpoint", "shape"]

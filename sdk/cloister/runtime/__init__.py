"""Runs bundles: engines, conversations, sampling, and the worker process that holds them."""

"""From a bundle to what an app developer pastes: its files as a store wants them, and the glue.

The glue of a platform is source code around ExecuTorch's stock runner, the same for every bundle;
what it must know of this one stands in one file of constants.
"""

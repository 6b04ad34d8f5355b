"""The platforms there is glue for; light, since the command line reads it first."""

__all__ = ["PLATFORMS"]

PLATFORMS = ("android", "ios", "react-native", "cpp")

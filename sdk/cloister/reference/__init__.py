"""The shipped reference family, and the program that builds it."""

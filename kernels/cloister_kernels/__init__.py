"""The operators of Cloister's programs: their meaning, and their implementations."""

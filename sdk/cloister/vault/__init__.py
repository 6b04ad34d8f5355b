"""What is kept of the user, sealed: see FORMAT.md. Imports no torch."""

"""Evidence for what is claimed: that nothing of the user lies open."""

"""A run that is killed again and again must reach the same end."""

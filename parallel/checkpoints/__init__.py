"""Checkpoints: whole or absent, independent of engine and number of ranks."""

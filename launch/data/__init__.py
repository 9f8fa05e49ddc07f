"""Tokens: tokenizers, prepared files, and the stream of packed sequences."""

"""Machines and runs: command line, configuration, data, the training loop, verification."""

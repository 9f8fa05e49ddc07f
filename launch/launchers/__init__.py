"""Who starts the ranks of a run: this process, torchrun, or Ray."""

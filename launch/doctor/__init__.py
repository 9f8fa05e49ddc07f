"""Whether a machine, or a job, is fit to train."""

"""The typed schema of a run, and the YAML that it is written in."""

"""The planner: what a job is predicted to take, in seconds and bytes, and how to cut it."""

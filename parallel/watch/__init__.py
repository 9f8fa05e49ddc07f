"""Who watches the collectives of a job, and explains a hang."""

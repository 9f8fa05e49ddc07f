"""What one run does on its ranks: meeting, checks, backends, folders, reports."""

"""What scripts/gpu_check.py runs, and how: `plan` names the items, `supervise` runs them in a process that may hang."""

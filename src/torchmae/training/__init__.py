"""Training: the loop and what it stands on. Knows models, data and the run folder; not how results are shown."""

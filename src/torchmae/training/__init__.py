"""Training: the loop, optimisers, ranks, checkpoints and the run folder."""

"""Predicts the cost of a run."""

"""Evaluation: what a model learned, in figures that can be compared. Each part gives names and numbers."""

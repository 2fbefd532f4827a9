"""Models for other people: exports with a check and a model card, and the Hugging Face hub."""

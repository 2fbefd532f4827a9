"""Patches, masks and the networks. Plain numbers in, tensors out; nothing here knows of configuration or data."""

"""From a path or a name to batches on the device: sources, decoding, crops and flips, order, loaders."""

"""Weights of other libraries: timm, transformers, the released MAE checkpoints."""

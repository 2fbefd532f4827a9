"""Weights of other libraries, read and written: timm, transformers, the released MAE checkpoints, ONNX."""

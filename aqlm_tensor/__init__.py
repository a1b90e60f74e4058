"""AQLM (Additive Quantization of Language Models) as an ordinary PyTorch tensor type."""

"""Kernels over plain tensors and an AQLMScheme; imported as `aqlm_tensor.kernels`."""

"""Adapters to other libraries; imported as `aqlm_tensor.integrations`."""

"""The command line, `aqlm-tensor`."""

from aqlm_tensor.cli.app import main

__all__ = ["main"]

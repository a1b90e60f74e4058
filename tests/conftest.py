"""Settings that every test runs under."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported and its kernels are defined

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}

# `make test` must give the same verdict every time, so its examples are fixed; `make test-full` explores.
hypothesis.settings.register_profile("default", max_examples=25, derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("full", max_examples=100, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests may draw from torch's global generator; what they draw does not depend on which tests ran before."""
    torch.manual_seed(0)

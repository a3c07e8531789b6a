"""What the tests of the CUDA kernels share."""

import cuda_on_cpu
import pytest


@pytest.fixture
def launcher():
    """The kernels compiled for the CPU; arrays between fences stay until the end of the test."""
    launcher = cuda_on_cpu.launcher()
    yield launcher
    launcher.remove_fences()

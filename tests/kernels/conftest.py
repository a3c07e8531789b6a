"""What the tests of the CUDA kernels share."""

import cuda_on_cpu
import cuda_on_gpu
import pytest
import torch


@pytest.fixture
def launcher():
    """The kernels on a GPU where there is one, otherwise compiled for the CPU; arrays between fences stay until the end of the test."""
    launcher = (cuda_on_gpu if torch.cuda.is_available() else cuda_on_cpu).launcher()
    yield launcher
    launcher.remove_fences()

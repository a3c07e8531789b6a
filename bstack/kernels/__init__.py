"""Arithmetic on packed matrices: a plain numpy reference, and kernels in C, CUDA or Triton where they are available."""

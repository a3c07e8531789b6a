"""Arithmetic on packed matrices: a plain numpy reference, and C or Triton kernels where they are available."""

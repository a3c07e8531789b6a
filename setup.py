"""Builds the C kernels. Everything else stands in setup.cfg, which has no field for extensions.

The kernels are optional: without a compiler the installation succeeds and the reference implementations are used.
They know nothing of Python and are loaded with ctypes, so one build serves every version of it.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "bstack.kernels._native",
            sources=sorted(glob("csrc/*.c")),
            depends=glob("csrc/*.h"),
            # No -march: each file that needs an instruction set asks for it itself. And the same bits everywhere.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)

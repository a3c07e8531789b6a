"""Builds the C kernels. Everything else is in setup.cfg, which has no field for extensions.

The kernels need GCC or Clang and are optional: without a compiler the installation succeeds and the numpy reference runs.
They do not use Python's C interface and are loaded with ctypes, so one build serves every version of it.
"""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """Warn where the kernels cannot be built; setuptools then goes on without them."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception:
            print(
                "WARNING: the C kernels could not be built, so bstack runs its numpy reference, some hundred times slower. "
                "Install GCC or Clang and reinstall bstack; `bstack --version` says which kernels are in use.",
                file=sys.stderr,
            )
            raise


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "bstack.kernels._native",
            sources=sorted(glob("csrc/*.c")),
            depends=glob("csrc/*.h"),
            # No -march: each file that needs an instruction set asks for it. No symbols for debuggers, which are most of the
            # library. No contraction: the same bits everywhere.
            extra_compile_args=["-O3", "-g0", "-ffp-contract=off"],
            optional=True,
        )
    ],
)

"""The C kernels. Everything else about the package is in pyproject.toml.

They are a plain shared library, opened with ctypes; setuptools compiles it as if it were an extension module. Without a
C compiler the installation goes on, and PyTorch's kernels run instead: ``vlaquant doctor`` says so.
"""

from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("vlaquant/kernels/native")

setup(
    ext_modules=[
        Extension(
            "vlaquant.kernels.native._kernels",
            sources=sorted(map(str, FOLDER.glob("*.c"))),
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            extra_compile_args=["-std=c11", "-O3", "-g0", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)

"""Builds edgehold._kernel: cffi's API mode, one extension for every Python from 3.11 on (abi3).

setup.py names `ffibuilder`; nothing imports this at run time. Paths are relative to the project's root, where
setuptools runs.
"""

from pathlib import Path
from typing import Any

from cffi import FFI

HERE = Path(__file__).resolve().parent

ffibuilder: Any = FFI()  # type: ignore[no-untyped-call]
ffibuilder.cdef((HERE / "cdef.h").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "edgehold._kernel",
    '#include "kernel.h"',
    sources=["ext/kernel.c"],
    include_dirs=["ext"],
    depends=["ext/cdef.h", "ext/kernel.h"],
    extra_compile_args=["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)

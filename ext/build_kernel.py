"""Builds edgehold._kernel: cffi's API mode, one extension for every Python from 3.11 on (abi3).

setup.py names `ffibuilder`; nothing imports this at run time. Paths are relative to the project's root, where
setuptools runs.
"""

from pathlib import Path
from typing import Any

from cffi import FFI

HERE = Path(__file__).resolve().parent

ffibuilder: Any = FFI()  # type: ignore[no-untyped-call]
for text in ("cdef.h", "vmanager_cdef.h", "vmanager_calls.h"):
    ffibuilder.cdef((HERE / text).read_text(encoding="utf-8"))
ffibuilder.set_source(
    "edgehold._kernel",
    '#include "kernel.h"\n#include "vmanager.h"\n#include "vmanager_calls.h"',
    sources=["ext/kernel.c", "ext/numa.c", "ext/vmanager.c"],
    include_dirs=["ext", "ext/uapi"],
    depends=[
        "ext/cdef.h",
        "ext/kernel.h",
        "ext/vmanager_cdef.h",
        "ext/vmanager_calls.h",
        "ext/uapi/vmanager.h",
    ],
    extra_compile_args=["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)

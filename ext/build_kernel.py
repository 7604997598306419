"""Builds edgehold._kernel: cffi's API mode, one extension for every Python from 3.11 on (abi3).

setup.py names `ffibuilder`; nothing imports this at run time. Paths are relative to the project's root, where
setuptools runs. Every ``*_cdef.h`` and ``*.c`` here is a part of it.
"""

from pathlib import Path
from typing import Any

from cffi import FFI

HERE = Path(__file__).resolve().parent

# The calls of /dev/vmanager name structures of vmanager_cdef.h, so they come last.
declarations = [*sorted(HERE.glob("*cdef.h")), HERE / "vmanager_calls.h"]

ffibuilder: Any = FFI()  # type: ignore[no-untyped-call]
for one in declarations:
    ffibuilder.cdef(one.read_text(encoding="utf-8"))
headers = sorted({one.name for one in HERE.glob("*.h") if not one.name.endswith("cdef.h")} - {"vmanager_calls.h"})
ffibuilder.set_source(
    "edgehold._kernel",
    "".join(f'#include "{name}"\n' for name in (*headers, "vmanager.h", "vmanager_calls.h")),
    sources=[f"ext/{one.name}" for one in sorted(HERE.glob("*.c"))],
    include_dirs=["ext", "ext/uapi"],
    depends=[*(f"ext/{one.name}" for one in sorted(HERE.glob("*.h"))), "ext/uapi/vmanager.h"],
    extra_compile_args=["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)

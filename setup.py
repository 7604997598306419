"""The cffi hook, which pyproject.toml can't express; everything else is said there."""

from setuptools import setup

setup(cffi_modules=["ext/build_kernel.py:ffibuilder"])

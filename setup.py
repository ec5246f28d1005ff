"""Builds the native core. Everything else about the package is in pyproject.toml.

The core knows nothing of torch: one library serves every torch, builds under pip's isolation in
seconds, and its absence leaves the package working on the plain-torch reference.
"""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent

cpu = Pybind11Extension(
    "offtower.ops._cpu",
    sorted(
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("csrc/cpu/**/*.cpp"), ROOT / "csrc/bindings/cpu_module.cpp"]
    ),
    depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")],
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=fast"],
    extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
)
# A machine without a compiler still gets a working package; `offtower doctor` says what is missing.
cpu.optional = True

setup(ext_modules=[cpu], cmdclass={"build_ext": build_ext})

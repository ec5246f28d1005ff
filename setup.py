"""Builds the native cores. Everything else about the package is in pyproject.toml.

The cores know nothing of torch: one library serves every torch, builds under pip's isolation in
seconds, and its absence leaves the package working on the plain-torch reference.

The CUDA core is built where nvcc is found and a GPU is visible. OFFTOWER_CUDA=1 builds it without
a GPU and fails if it cannot; OFFTOWER_CUDA=0 leaves it out. OFFTOWER_CUDA_ARCHITECTURES ("80 90a")
says for what. Why it was not built is kept for `offtower doctor`.

OFFTOWER_SANITIZE=1 builds the CPU core with AddressSanitizer and UBSan, under build/sanitized: see
`make test-asan`.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
sys.path.insert(0, str((ROOT / "csrc/cuda").resolve()))
import cuda_build  # noqa: E402

HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
ARCHITECTURES = os.environ.get("OFFTOWER_CUDA_ARCHITECTURES", "80 90a").split()
WISH = os.environ.get("OFFTOWER_CUDA", "")
WHY_NOT = "_cuda_build.txt"
SANITIZE = os.environ.get("OFFTOWER_SANITIZE") == "1"
# object-size finds nothing that AddressSanitizer does not, and takes minutes to compile.
SANITIZERS = (
    ["-fsanitize=address,undefined", "-fno-sanitize=object-size,vptr", "-fno-sanitize-recover=all"]
    if SANITIZE
    else []
)


def gpu_is_visible() -> bool:
    return any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def why_no_cuda() -> str:
    """A reason not to build the CUDA core, or ""."""
    if WISH == "0":
        return "OFFTOWER_CUDA=0 was set when offtower was installed"
    if WISH != "1" and not gpu_is_visible():
        return "no NVIDIA GPU was visible when offtower was installed, and OFFTOWER_CUDA=1 not set"
    if cuda_build.find_nvcc() is None:
        return "CUDA's compiler nvcc was not found when offtower was installed"
    return ""


class BuildCores(build_ext):
    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("offtower.ops._cpu")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / WHY_NOT).write_text(why_no_cuda() + "\n")

    def build_extension(self, ext: Pybind11Extension) -> None:
        if ext.name.endswith("_cuda"):
            folder = Path(self.build_temp, "cuda").resolve()
            try:
                ext.extra_objects = cuda_build.compile_kernels(folder, ARCHITECTURES)
            except RuntimeError as error:
                raise CompileError(str(error)) from error  # which an optional core may have
            ext.library_dirs += cuda_build.library_folders()
        super().build_extension(ext)


cpu = Pybind11Extension(
    "offtower.ops._cpu",
    sorted(
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("csrc/cpu/**/*.cpp"), ROOT / "csrc/bindings/cpu_module.cpp"]
    ),
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=[
        *(["-O1", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3"]),
        *("-fno-math-errno", "-ffp-contract=fast", *SANITIZERS),
    ],
    extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else []), *SANITIZERS],
)
# A machine without a compiler still gets a working package; `offtower doctor` says what is missing.
cpu.optional = not SANITIZE

cuda = Pybind11Extension(
    "offtower.ops._cuda",
    ["csrc/bindings/cuda_module.cpp"],
    depends=[*HEADERS, *cuda_build.sources(ARCHITECTURES)],
    cxx_std=17,
    define_macros=list(cuda_build.macros(ARCHITECTURES).items()),
    libraries=list(cuda_build.LIBRARIES),
)
cuda.optional = WISH != "1"

if WISH == "1" and why_no_cuda():
    raise SystemExit(f"OFFTOWER_CUDA=1: {why_no_cuda()}; put nvcc on the PATH or set CUDA_HOME")

setup(
    ext_modules=[cpu] if why_no_cuda() else [cpu, cuda],
    cmdclass={"build_ext": BuildCores},
    options={"build": {"build_base": "build/sanitized"}} if SANITIZE else {},
)

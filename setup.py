"""Builds the native cores. Everything else about the package is in pyproject.toml.

The cores know nothing of torch: one library serves every torch, builds under pip's isolation in
seconds, and its absence leaves the package working on the plain-torch reference.

The CUDA core is built where nvcc is found and a GPU is visible. OFFTOWER_CUDA=1 builds it without
a GPU and fails if it cannot; OFFTOWER_CUDA=0 leaves it out. OFFTOWER_CUDA_ARCHITECTURES ("80 90a")
says for what. Why it was not built is kept for `offtower doctor`.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
ARCHITECTURES = os.environ.get("OFFTOWER_CUDA_ARCHITECTURES", "80 90a").split()
WHY_NOT = "_cuda_build.txt"


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    given = [Path(home, "bin", "nvcc") for home in homes if home]
    return next((str(p) for p in given if p.exists()), None) or shutil.which("nvcc")


def gpu_is_visible() -> bool:
    return any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def why_no_cuda() -> str:
    """A reason not to build the CUDA core, or ""."""
    wish = os.environ.get("OFFTOWER_CUDA", "")
    if wish == "0":
        return "OFFTOWER_CUDA=0 was set when offtower was installed"
    if wish != "1" and not gpu_is_visible():
        return "no NVIDIA GPU was visible when offtower was installed, and OFFTOWER_CUDA=1 not set"
    return "" if find_nvcc() else "CUDA's compiler nvcc was not found when offtower was installed"


def machine_code(architecture: str) -> list[str]:
    """Options of nvcc: sm_80 carries PTX too, which later devices compile when they load it."""
    code = f"sm_{architecture}"
    if architecture.isdigit():
        code = f"[{code},compute_{architecture}]"
    return ["-gencode", f"arch=compute_{architecture},code={code}"]


def compile_kernels(folder: Path) -> list[str]:
    """Objects of the CUDA sources, side by side."""
    nvcc = find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    options += [option for a in ARCHITECTURES for option in machine_code(a)]

    def build(source: str) -> str:
        target = folder / f"{Path(source).stem}.o"
        report = target.with_suffix(".txt")  # registers, spills and shared memory of each kernel
        with report.open("w") as out:
            subprocess.run(
                [nvcc, *options, "-c", source, "-o", str(target)],
                check=True,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return str(target)

    def run(source: str) -> str:
        try:
            return build(source)
        except subprocess.CalledProcessError as error:
            said = (folder / f"{Path(source).stem}.txt").read_text()
            raise RuntimeError(f"nvcc failed on {source}:\n{said[-4000:]}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, KERNELS))


class BuildCores(build_ext):
    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("offtower.ops._cpu")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / WHY_NOT).write_text(why_no_cuda() + "\n")

    def build_extension(self, ext: Pybind11Extension) -> None:
        if ext.name.endswith("_cuda"):
            home = Path(find_nvcc() or "").resolve().parents[1]
            objects = compile_kernels(Path(self.build_temp, "cuda"))
            ext.extra_objects = objects
            candidates = [home, Path("/usr/local/cuda")]
            ext.library_dirs += [
                str(place)
                for base in candidates
                for place in (base / "lib64", base / "lib", base / "targets/x86_64-linux/lib")
                if (place / "libcudart_static.a").exists()
            ]
        super().build_extension(ext)


cpu = Pybind11Extension(
    "offtower.ops._cpu",
    sorted(
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("csrc/cpu/**/*.cpp"), ROOT / "csrc/bindings/cpu_module.cpp"]
    ),
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=fast"],
    extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
)
# A machine without a compiler still gets a working package; `offtower doctor` says what is missing.
cpu.optional = True

cuda = Pybind11Extension(
    "offtower.ops._cuda",
    ["csrc/bindings/cuda_module.cpp"],
    depends=[*HEADERS, *KERNELS],
    cxx_std=17,
    define_macros=[
        ("OFFTOWER_CUDA_MODULE", "_cuda"),
        ("OFFTOWER_CUDA_ARCHITECTURES", '"' + ", ".join(f"sm_{a}" for a in ARCHITECTURES) + '"'),
    ],
    libraries=["cudart_static", "rt", "pthread", "dl"],
)
cuda.optional = os.environ.get("OFFTOWER_CUDA", "") != "1"

if os.environ.get("OFFTOWER_CUDA", "") == "1" and why_no_cuda():
    raise SystemExit(f"OFFTOWER_CUDA=1: {why_no_cuda()}; put nvcc on the PATH or set CUDA_HOME")

setup(
    ext_modules=[cpu] if why_no_cuda() else [cpu, cuda],
    cmdclass={"build_ext": BuildCores},
)

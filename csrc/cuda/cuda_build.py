"""Compiles the CUDA core with nvcc; for setup.py, and for the benchmark, which builds in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOPPER = "90a"  # has kernels of its own, which no other architecture compiles
LIBRARIES = ("cudart_static", "rt", "pthread", "dl")


def find_nvcc() -> str | None:
    """CUDA_HOME's, the usual place's, or the PATH's."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    given = [Path(home, "bin", "nvcc") for home in homes if home]
    return next((str(p) for p in given if p.exists()), None) or shutil.which("nvcc")


def library_folders() -> list[str]:
    """Where libcudart_static.a is."""
    bases = [Path(find_nvcc() or "/").resolve().parents[1], Path("/usr/local/cuda")]
    places = [base / sub for base in bases for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return [str(place) for place in places if (place / "libcudart_static.a").exists()]


def sources(architectures: Sequence[str]) -> list[str]:
    """Relative to the root."""
    left_out = "no_hopper.cu" if HOPPER in architectures else "hopper_*.cu"
    return sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob("csrc/cuda/*.cu")
        if not path.match(left_out)
    )


def macros(architectures: Sequence[str], module: str = "_cuda") -> dict[str, str]:
    """What csrc/bindings/cuda_module.cpp is compiled with."""
    names = ", ".join(f"sm_{a}" for a in architectures)
    return {"OFFTOWER_CUDA_MODULE": module, "OFFTOWER_CUDA_ARCHITECTURES": f'"{names}"'}


def _machine_code(architecture: str) -> list[str]:
    """Options of nvcc: plain ones carry PTX too, which later devices compile when they load it."""
    code = f"sm_{architecture}"
    if architecture.isdigit():
        code = f"[{code},compute_{architecture}]"
    return ["-gencode", f"arch=compute_{architecture},code={code}"]


def compile_kernels(folder: Path, architectures: Sequence[str]) -> list[str]:
    """Objects of the kernels, compiled side by side; beside each what it takes of the device.

    Raises:
        RuntimeError: nvcc failed; the end of what it said.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]

    def build(source: str) -> str:
        target = folder / f"{Path(source).stem}.o"
        own = Path(source).stem.startswith("hopper_")
        code = [x for a in architectures if a == HOPPER or not own for x in _machine_code(a)]
        command = [nvcc, *options, *code, "-c", source, "-o", str(target)]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # Registers, spills and shared memory of each kernel.
        target.with_suffix(".txt").write_text(done.stdout)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout[-4000:]}")
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build, sources(architectures)))


def build_in_place(architectures: Sequence[str], pybind11_include: str, folder: Path) -> Path:
    """python/offtower/ops/_cuda of this interpreter, without setuptools."""
    objects = compile_kernels(folder, architectures)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = ROOT / "python/offtower/ops" / f"_cuda{suffix}"
    defines = [f"-D{name}={value}" for name, value in macros(architectures).items()]
    include = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11_include}"]
    binding = str(ROOT / "csrc/bindings/cuda_module.cpp")
    link = [f"-L{place}" for place in library_folders()] + [f"-l{name}" for name in LIBRARIES]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run(
        [*command, *defines, *include, binding, *objects, *link, "-o", str(target)], check=True
    )
    return target

"""Compile the CUDA core with nvcc, for setup.py and for the benchmark, which builds in place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOPPER = "90a"  # the hopper_*.cu files are compiled for this architecture alone
LIBRARIES = ("cudart_static", "rt", "pthread", "dl")


def find_nvcc() -> str | None:
    """Return nvcc of CUDA_HOME, of /usr/local/cuda or of the PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    given = [Path(home, "bin", "nvcc") for home in homes if home]
    return next((str(p) for p in given if p.exists()), None) or shutil.which("nvcc")


def library_folders() -> list[str]:
    """Return the folders that hold libcudart_static.a."""
    bases = [Path(find_nvcc() or "/").resolve().parents[1], Path("/usr/local/cuda")]
    places = [base / sub for base in bases for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return [str(place) for place in places if (place / "libcudart_static.a").exists()]


def sources(architectures: Sequence[str]) -> list[str]:
    """Return the files to compile, relative to the root."""
    excluded = "no_hopper.cu" if HOPPER in architectures else "hopper_*.cu"
    return sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob("csrc/cuda/*.cu")
        if not path.match(excluded)
    )


KERNELS = ("csrc/operands.h", "csrc/cuda/**/*.h", "csrc/cuda/**/*.cu")
MODULE = (*KERNELS, "csrc/bindings/cuda_module.cpp", "csrc/bindings/*.h")


def fingerprint(patterns: Sequence[str] = MODULE) -> str:
    """Return a hash of the sources; a built core reports its own as `_cuda.sources`."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    total = hashlib.sha256()
    for path in sorted(p for p in paths if "emulation" not in p.parts):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def macros(architectures: Sequence[str], module: str = "_cuda") -> dict[str, str]:
    """Return the macros of csrc/bindings/cuda_module.cpp."""
    names = ", ".join(f"sm_{a}" for a in architectures)
    return {
        "OFFTOWER_CUDA_MODULE": module,
        "OFFTOWER_CUDA_ARCHITECTURES": f'"{names}"',
        "OFFTOWER_CUDA_SOURCES": f'"{fingerprint()}"',
    }


def _machine_code(architecture: str) -> list[str]:
    """Return nvcc's options; architectures without a suffix add PTX, for later devices."""
    code = f"sm_{architecture}"
    if architecture.isdigit():
        code = f"[{code},compute_{architecture}]"
    return ["-gencode", f"arch=compute_{architecture},code={code}"]


def _release(nvcc: str) -> str:
    """Return the release of CUDA, as in "13.0"."""
    version = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"release ([\d.]+)", version)
    return found[1] if found else version


def compile_kernels(folder: Path, architectures: Sequence[str]) -> list[str]:
    """Compile the kernels in parallel and return the paths of the objects.

    Beside each object NAME.o, NAME.txt holds the compiler's report of registers, spills and shared
    memory. Objects from the same sources, options and release of CUDA are reused.

    Raises:
        RuntimeError: nvcc failed, with the end of its output.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    options += [f"-DOFFTOWER_BUILT_ARCHITECTURES={'_'.join(architectures)}"]
    built_from = f"{fingerprint(KERNELS)} {_release(nvcc)} {' '.join(options)}"

    def build(source: str) -> str:
        target = folder / f"{Path(source).stem}.o"
        hopper = Path(source).stem.startswith("hopper_")
        code = [x for a in architectures if a == HOPPER or not hopper for x in _machine_code(a)]
        command = [nvcc, *options, *code, "-c", source, "-o", str(target)]
        key, current = target.with_suffix(".key"), f"{built_from} {' '.join(code)}"
        if target.exists() and key.exists() and key.read_text() == current:
            return str(target)
        key.unlink(missing_ok=True)
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        target.with_suffix(".txt").write_text(done.stdout)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout[-4000:]}")
        key.write_text(current)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build, sources(architectures)))


def build_in_place(
    architectures: Sequence[str], pybind11_include: str, folder: Path, python: str = sys.executable
) -> Path:
    """Build python/offtower/ops/_cuda without setuptools and return its path.

    Args:
        architectures: as in ("80", "90a").
        pybind11_include: the folder of pybind11's headers.
        folder: for objects.
        python: the interpreter to build for. The module depends on this machine's C library alone,
            and loads on others whose C library is not older.
    """
    objects = compile_kernels(folder, architectures)
    query = (
        "import json, sysconfig as s; "
        "print(json.dumps([s.get_paths()['include'], s.get_config_var('EXT_SUFFIX')]))"
    )
    answer = subprocess.run([python, "-c", query], stdout=subprocess.PIPE, text=True, check=True)
    python_include, suffix = json.loads(answer.stdout)
    target = ROOT / "python/offtower/ops" / f"_cuda{suffix}"
    defines = [f"-D{name}={value}" for name, value in macros(architectures).items()]
    include = [f"-I{python_include}", f"-I{pybind11_include}"]
    binding = str(ROOT / "csrc/bindings/cuda_module.cpp")
    link = [f"-L{place}" for place in library_folders()] + [f"-l{name}" for name in LIBRARIES]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-static-libstdc++", "-static-libgcc"]
    unfinished = target.with_suffix(".new")
    subprocess.run(
        [*command, *defines, *include, binding, *objects, *link, "-o", str(unfinished)], check=True
    )
    os.replace(unfinished, target)
    return target

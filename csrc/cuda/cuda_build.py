"""Compiles the CUDA core with nvcc; for setup.py, and for the benchmark, which builds in place."""

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


KERNELS = ("csrc/operands.h", "csrc/cuda/**/*.h", "csrc/cuda/**/*.cu")
MODULE = (*KERNELS, "csrc/bindings/cuda_module.cpp", "csrc/bindings/*.h")


def fingerprint(patterns: Sequence[str] = MODULE) -> str:
    """Of what is compiled; a core names its own as `_cuda.sources`."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    total = hashlib.sha256()
    for path in sorted(p for p in paths if "emulation" not in p.parts):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def macros(architectures: Sequence[str], module: str = "_cuda") -> dict[str, str]:
    """What csrc/bindings/cuda_module.cpp is compiled with."""
    names = ", ".join(f"sm_{a}" for a in architectures)
    return {
        "OFFTOWER_CUDA_MODULE": module,
        "OFFTOWER_CUDA_ARCHITECTURES": f'"{names}"',
        "OFFTOWER_CUDA_SOURCES": f'"{fingerprint()}"',
    }


def _machine_code(architecture: str) -> list[str]:
    """Options of nvcc: plain ones carry PTX too, which later devices compile when they load it."""
    code = f"sm_{architecture}"
    if architecture.isdigit():
        code = f"[{code},compute_{architecture}]"
    return ["-gencode", f"arch=compute_{architecture},code={code}"]


def _release(nvcc: str) -> str:
    """CUDA's, as in "13.0"."""
    said = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else said


def compile_kernels(folder: Path, architectures: Sequence[str]) -> list[str]:
    """Objects of the kernels, compiled side by side; beside each what it takes of the device.

    An object that is there from the same sources, options and release of CUDA is kept.

    Raises:
        RuntimeError: nvcc failed; the end of what it said.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    made_from = f"{fingerprint(KERNELS)} {_release(nvcc)} {' '.join(options)}"

    def build(source: str) -> str:
        target = folder / f"{Path(source).stem}.o"
        own = Path(source).stem.startswith("hopper_")
        code = [x for a in architectures if a == HOPPER or not own for x in _machine_code(a)]
        command = [nvcc, *options, *code, "-c", source, "-o", str(target)]
        key, this = target.with_suffix(".key"), f"{made_from} {' '.join(code)}"
        if target.exists() and key.exists() and key.read_text() == this:
            return str(target)
        key.unlink(missing_ok=True)
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # Registers, spills and shared memory of each kernel.
        target.with_suffix(".txt").write_text(done.stdout)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout[-4000:]}")
        key.write_text(this)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build, sources(architectures)))


def build_in_place(
    architectures: Sequence[str], pybind11_include: str, folder: Path, python: str = sys.executable
) -> Path:
    """python/offtower/ops/_cuda of an interpreter, without setuptools.

    Args:
        folder: for objects.
        python: another interpreter than this one builds for a machine that has it: the module needs
            nothing of this machine but its C library, so that it loads where that is as new.
    """
    objects = compile_kernels(folder, architectures)
    ask = (
        "import json, sysconfig as s; "
        "print(json.dumps([s.get_paths()['include'], s.get_config_var('EXT_SUFFIX')]))"
    )
    said = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout
    python_include, suffix = json.loads(said)
    target = ROOT / "python/offtower/ops" / f"_cuda{suffix}"
    defines = [f"-D{name}={value}" for name, value in macros(architectures).items()]
    include = [f"-I{python_include}", f"-I{pybind11_include}"]
    binding = str(ROOT / "csrc/bindings/cuda_module.cpp")
    link = [f"-L{place}" for place in library_folders()] + [f"-l{name}" for name in LIBRARIES]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-static-libstdc++", "-static-libgcc"]
    fresh = target.with_suffix(".new")
    subprocess.run(
        [*command, *defines, *include, binding, *objects, *link, "-o", str(fresh)], check=True
    )
    os.replace(fresh, target)
    return target

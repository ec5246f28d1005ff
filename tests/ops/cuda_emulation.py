"""The CUDA kernels on a machine without a GPU, compiled for an emulated thread block.

A host compiler takes the same kernels that nvcc takes; csrc/cuda/emulation says what each PTX
instruction means, runs threads in a drawn order and has copies land late. It cannot show time.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offtower.ops import library, native_cuda, policy
from offtower.ops.reference import Inputs

SOURCES = Path(__file__).parents[2] / "csrc"

# "major minor multiprocessors bytes-of-a-block bytes-of-a-multiprocessor", see device_facts.cu; few
# multiprocessors, so that few blocks are enough to make pieces of work follow each other.
DEVICES = {
    "sm_80": "8 0 3 166912 167936",
    "sm_86": "8 6 2 101376 102400",
    "sm_90": "9 0 3 232448 233472",
}


def why_not() -> str:
    """Why the emulation cannot be built here, or ""."""
    if platform.machine() != "x86_64":
        return "the emulation switches fibers in x86-64 assembly"
    return "" if shutil.which("g++") else "no g++ to build the emulation with"


def build(folder: Path) -> ModuleType:
    """Compile and load the module. Some 20 s of processor time, for the first that comes: processes
    of one test run share the folder."""
    path = folder / "_cuda_emulated.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(folder, path)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(folder: Path, path: Path) -> None:
    include = [sysconfig.get_paths()["include"], str(Path(torch.__file__).parent / "include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DOFFTOWER_CUDA_EMULATED"]
    flags += ["-DOFFTOWER_CUDA_MODULE=_cuda_emulated", '-DOFFTOWER_CUDA_SOURCES="emulation"']
    flags += ['-DOFFTOWER_CUDA_ARCHITECTURES="emulation"']
    kernels = [p for p in sorted(SOURCES.glob("cuda/*.cu")) if p.stem != "no_hopper"]
    others = [SOURCES / "cuda/emulation/block.cpp", SOURCES / "bindings/cuda_module.cpp"]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        options = [f"-I{p}" for p in include]
        command = ["g++", *flags, *options, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, kernels + others))
    unfinished = path.with_suffix(".unfinished")
    subprocess.run(["g++", "-shared", *objects, "-o", str(unfinished)], check=True)
    unfinished.rename(path)


def put_in_place(module: ModuleType, device: str, patch: pytest.MonkeyPatch) -> None:
    """Until the patch ends every operator on CPU tensors runs on the emulation of `device`."""

    def core_of(backend: str, x: Inputs, k: int = 0) -> ModuleType | None:
        refusal = native_cuda.refusal(x, k)
        assert not refusal, refusal
        return native_cuda if x.u.shape[0] else None

    patch.setenv("OFFTOWER_EMULATED_DEVICE", DEVICES[device])
    patch.setattr(native_cuda, "library", lambda: module)
    patch.setattr(native_cuda, "_load", lambda: (module, "emulated"))
    patch.setattr(library, "core_of", core_of)
    patch.setattr(policy, "core_of", core_of)

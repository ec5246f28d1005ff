"""Build the CUDA kernels for an emulated thread block, to test them without a GPU.

A host compiler takes the kernels' unchanged sources; csrc/cuda/emulation implements the PTX
instructions, runs threads in random order and completes copies late. Nothing here measures time.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offtower.ops import cores, cuda_core
from offtower.ops.reference import ReferenceCore
from offtower.ops.types import Operands

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"

# The members of cuda::Device from `major` to `total_shared`. With few multiprocessors, small
# problems give each block several work tiles.
DEVICES = {
    "sm_80": "8 0 3 166912 167936",
    "sm_86": "8 6 2 101376 102400",
    "sm_90": "9 0 3 232448 233472",
}


def why_not() -> str:
    """Return why the emulation cannot be built here, or an empty string."""
    if platform.machine() != "x86_64":
        return "the emulation switches fibers in x86-64 assembly"
    return "" if shutil.which("g++") else "no g++ to build the emulation with"


def build() -> ModuleType:
    """Compile and load the module.

    Compiling takes about 25 s of processor time, so the result is kept in build/emulation under a
    hash of the sources. Concurrent test processes wait for one of them to compile.
    """
    cache = ROOT / "build/emulation"
    folder = cache / _fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "_cuda_emulated.so"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for outdated in cache.glob("*/"):
                if outdated != folder:
                    shutil.rmtree(outdated)
            _compile(folder, path)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fingerprint() -> str:
    total = hashlib.sha256(f"{sys.version} {torch.__version__}".encode())
    for path in (Path(__file__), *sorted(SOURCES.rglob("*"))):
        if path.is_file() and "cpu" not in path.relative_to(ROOT).parts:
            total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


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
    """Run every operator on CPU tensors on the emulation of `device`, until the patch ends."""

    core = cuda_core.CUDACore()

    def choose_core(backend: str, x: Operands, k: int = 0) -> cores.Core:
        refusal = core.kernel_refusal(x, k)
        assert not refusal, refusal
        return core if x.rows else ReferenceCore()

    patch.setenv("OFFTOWER_EMULATED_DEVICE", DEVICES[device])
    patch.setattr(cuda_core, "_load", lambda: (module, "emulated"))
    patch.setattr(cores, "choose_core", choose_core)

"""Instruction sets of other machines under an emulator, against plain loops in float64.

Compiles the CPU kernels and `native_check.cpp` for aarch64 and runs them with QEMU's user-mode
emulator. Debian has both as g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++17", "-O2", "-fno-math-errno", "-ffp-contract=fast", f"-I{ROOT / 'csrc'}")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}",
)
def test_neon_and_portable_kernels_on_aarch64(tmp_path: Path) -> None:
    """Terms, gradients and the best items, float32 and bfloat16, with and without a mask."""
    sources = [*ROOT.glob("csrc/cpu/**/*.cpp"), Path(__file__).with_name("native_check.cpp")]

    def compiled(source: Path) -> Path:
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([COMPILER, *FLAGS, "-c", str(source), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = tmp_path / "native_check"
    command = [COMPILER, "-static", *map(str, objects), "-pthread", "-ldl", "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["neon", "portable"]

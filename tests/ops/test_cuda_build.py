"""Parsing of nvcc's output, and reuse of compiled objects."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc/cuda"))

import cuda_build
import sass_report

DUMP = """
\t\tFunction : good
        /*0000*/         HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;  /* 0 */
        /*0010*/         HGMMA.64x64x16.F32.BF16 R64, R100, gdesc[UR8].tnspB, R64 ;  /* 0 */
        /*0020*/         FADD R120, R121, R122 ;  /* 0 */
        /*0030*/              @!P0 ST.E.128 desc[UR4][R2.64], R124 ;  /* 0 */
        /*0040*/         WARPGROUP.DEPBAR.LE gsb0, 0x0 ;  /* 0 */
        /*0050*/         FADD R24, R25, R103 ;  /* 0 */
\t\tFunction : bad
        /*0000*/         HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;  /* 0 */
        /*0010*/         HGMMA.64x64x16.F32.BF16 R64, R100, gdesc[UR8].tnspB, R64 ;  /* 0 */
        /*0020*/         FADD R120, R55, R122 ;  /* 0 */
        /*0030*/         LDS.128 R98, [R4] ;  /* 0 */
        /*0040*/         HGMMA.64x64x16.F32.BF16 R100, gdesc[UR4], RZ, !UPT, gsb0 ;  /* 0 */
        /*0050*/         STL [R1], R3 ;  /* 0 */
"""


def test_accesses_to_registers_of_wgmmas_in_flight_are_found() -> None:
    """An accumulator read before the wait; operands overwritten by a load and by another wgmma."""
    codes = dict(sass_report.read_sass(DUMP.splitlines()))
    assert codes["good"].hazards == [] and codes["good"].waits == 1
    assert codes["good"].wgmmas == {"64": 2}
    assert [line.split()[0] for line in codes["bad"].hazards] == ["0020", "0030", "0040"]
    assert codes["bad"].local_accesses == 1 and codes["good"].local_accesses == 0


def test_read_report_finds_registers_and_spills() -> None:
    text = (
        "ptxas info    : Compiling entry function '_Zk' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Zk\n"
        "    8 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
    )
    assert list(sass_report.read_report(text)) == [
        ("_Zk", "sm_90a", "168 registers, spills 8 and 16 bytes")
    ]


def test_unchanged_objects_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for nvcc that logs its calls."""
    calls = tmp_path / "calls"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release 13.0"; exit; fi\n'
        f'echo "$@" >> {calls}\nfor last; do :; done\ntouch "$last"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: str(nvcc))

    def compiled(*architectures: str) -> int:
        calls.write_text("")
        objects = cuda_build.compile_kernels(tmp_path / "objects", architectures)
        assert all(Path(o).exists() for o in objects)
        return len(calls.read_text().splitlines())

    assert compiled("80", "90a") == len(cuda_build.sources(("80", "90a"))) > 5
    assert compiled("80", "90a") == 0
    assert compiled("90a") > 0  # portable kernels were compiled for sm_80 too
    assert compiled("90a") == 0
    monkeypatch.setattr(cuda_build, "fingerprint", lambda *_: "of other sources")
    assert compiled("90a") == len(cuda_build.sources(("90a",)))

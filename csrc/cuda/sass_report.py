"""Report registers, spills and wgmmas of the Hopper kernels, and accesses that would be races.

    python csrc/cuda/sass_report.py build/gpu/*.o

Reads ptxas's report beside each object and the SASS for sm_90a, through cuobjdump of the PATH or of
/usr/local/cuda. A wgmma reads and writes its registers until the warpgroup waits for it; the script
fails if another instruction touches them before the wait. It follows the text, not the jumps.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_WGMMA = re.compile(r"HGMMA\.64x(\d+)x16\.F32")
# Instructions whose first operand is not a destination register.
_NO_DESTINATION = (
    "ST",
    "RED",
    "ATOM",
    "ISETP",
    "FSETP",
    "DSETP",
    "R2UR",
    "VOTE",
    "UTMA",
    "BAR",
    "SYNCS",
)
_DOUBLE = ("DADD", "DMUL", "DFMA", "IMAD.WIDE", "F2F.F64", "I2F.F64")


@dataclass
class Sass:
    """Facts about the code of one kernel."""

    instructions: int = 0
    local_accesses: int = 0
    waits: int = 0  # for wgmmas
    wgmmas: Counter[str] = field(default_factory=Counter)  # by columns
    hazards: list[str] = field(default_factory=list)


def _registers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\bR(\d+)\b", text)]


def _width(operation: str) -> int:
    if ".128" in operation:
        return 4
    return 2 if ".64" in operation or operation.startswith(_DOUBLE) else 1


def read_sass(lines: Iterable[str]) -> Iterator[tuple[str, Sass]]:
    """Yield the mangled name and the facts of each kernel in cuobjdump's output."""
    name, code = "", Sass()
    accumulators: set[int] = set()  # of wgmmas in flight
    operands_in_flight: set[int] = set()
    for line in lines:
        found = re.search(r"Function : (\S+)", line)
        if found:
            if name:
                yield name, code
            name, code = found[1], Sass()
            accumulators, operands_in_flight = set(), set()
            continue
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        at, operation, arguments = match.groups()
        code.instructions += 1
        code.local_accesses += operation.startswith(("LDL", "STL"))
        operands = arguments.split(",")
        wgmma = _WGMMA.match(operation)
        if wgmma:
            code.wgmmas[wgmma[1]] += 1
            first = _registers(operands[0])[0]
            written = set(range(first, first + int(wgmma[1]) // 2))
            if written & operands_in_flight:
                code.hazards.append(f"{at} {operation} overwrites operands in flight")
            accumulators |= written
            for start in _registers(operands[1]):
                operands_in_flight |= set(range(start, start + 4))
        elif operation.startswith("WARPGROUP.DEPBAR"):
            code.waits += 1
            accumulators, operands_in_flight = set(), set()
        elif accumulators:
            writes = not operation.startswith(_NO_DESTINATION) and operands[0].strip().startswith(
                "R"
            )
            target = _registers(operands[0])[:1] if writes else []
            written = {r + i for r in target for i in range(_width(operation))}
            read = set(_registers(",".join(operands[1:] if writes else operands)))
            if written & (accumulators | operands_in_flight) or read & accumulators:
                code.hazards.append(f"{at} {operation} {arguments.strip()}")
    if name:
        yield name, code


def read_report(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (mangled name, architecture, registers and spills) from the output of ptxas -v."""
    compiled = re.split(r"Compiling entry function '", text)[1:]
    for part in compiled:
        name, architecture = re.match(r"(\S+)' for '(\S+)'", part).groups()  # type: ignore[union-attr]
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        yield (
            name,
            architecture,
            f"{registers[1] if registers else '?'} registers, "
            f"spills {spilled[1] if spilled else '?'} and {spilled[2] if spilled else '?'} bytes",
        )


def readable(names: list[str]) -> dict[str, str]:
    """Map mangled to readable names, through c++filt where there is one."""
    if not shutil.which("c++filt"):
        return {n: n for n in names}
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True
    ).stdout
    short = [
        re.sub(r"\(offtower::cuda::Reward\)|offtower::cuda::", "", line).partition("run_kernel<")[2]
        for line in demangled.splitlines()
    ]
    return {n: s.partition(">(")[0].rstrip() or n for n, s in zip(names, short, strict=True)}


def main() -> None:
    tool = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    failed = False
    for path in map(Path, sys.argv[1:]):
        report = path.with_suffix(".txt")
        text = report.read_text() if report.exists() else ""
        serialized = re.findall(
            r"\((C75\d\d)\) Potential Performance Loss.*?function '(\S+)'", text
        )
        facts = {n: f for n, a, f in read_report(text) if a == "sm_90a"}
        dump = subprocess.run(
            [tool, "-sass", "-arch", "sm_90a", str(path)], capture_output=True, text=True
        ).stdout
        kernels = dict(read_sass(dump.splitlines()))
        plain = readable([*kernels])
        for name, code in kernels.items():
            wgmmas = ", ".join(f"{n} of {w} columns" for w, n in sorted(code.wgmmas.items()))
            print(
                f"{plain[name]}: {facts.get(name, 'no report')}; {code.instructions} instructions, "
                f"{code.local_accesses} of local memory; "
                f"wgmmas: {wgmmas or 'none'}, {code.waits} waits"
            )
            for hazard in code.hazards:
                print(f"    HAZARD: {hazard}")
            failed |= bool(code.hazards)
        for code_name, name in serialized:
            print(f"    {code_name}: wgmmas are serialized in {name}")
            failed = True
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

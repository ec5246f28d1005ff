"""What ptxas made of the kernels: registers, spills, products, and registers of products under way.

    python csrc/cuda/machine_code.py build/gpu/*.o

Reads the compiler's report beside each object and, through cuobjdump (the PATH's, or CUDA's usual
place), sm_90a's instructions. wgmma reads and writes registers long after it was issued, and only
the order of instructions keeps others off them until the wait: each kernel is searched for one that
touches them too early. The search follows the text and not the jumps.
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
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.F32")
# Their first operand is no register that they write.
_WRITE_NONE = (
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
class Code:
    """Of one kernel."""

    instructions: int = 0
    local: int = 0  # loads and stores of local memory
    waits: int = 0  # for products
    products: Counter[str] = field(default_factory=Counter)
    too_early: list[str] = field(default_factory=list)


def _registers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\bR(\d+)\b", text)]


def _width(operation: str) -> int:
    if ".128" in operation:
        return 4
    return 2 if ".64" in operation or operation.startswith(_DOUBLE) else 1


def read_code(lines: Iterable[str]) -> Iterator[tuple[str, Code]]:
    """(mangled name, code) of each kernel in cuobjdump's text."""
    name, code = "", Code()
    results: set[int] = set()  # of products under way
    weights: set[int] = set()  # which they read
    for line in lines:
        found = re.search(r"Function : (\S+)", line)
        if found:
            if name:
                yield name, code
            name, code, results, weights = found[1], Code(), set(), set()
            continue
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        at, operation, arguments = match.groups()
        code.instructions += 1
        code.local += operation.startswith(("LDL", "STL"))
        operands = arguments.split(",")
        product = _PRODUCT.match(operation)
        if product:
            code.products[product[1]] += 1
            first = _registers(operands[0])[0]
            written = set(range(first, first + int(product[1]) // 2))
            if written & weights:
                code.too_early.append(f"{at} {operation} over weights")
            results |= written
            for start in _registers(operands[1]):
                weights |= set(range(start, start + 4))
        elif operation.startswith("WARPGROUP.DEPBAR"):
            code.waits += 1
            results, weights = set(), set()
        elif results:
            writes = not operation.startswith(_WRITE_NONE) and operands[0].strip().startswith("R")
            target = _registers(operands[0])[:1] if writes else []
            written = {r + i for r in target for i in range(_width(operation))}
            read = set(_registers(",".join(operands[1:] if writes else operands)))
            if written & (results | weights) or read & results:
                code.too_early.append(f"{at} {operation} {arguments.strip()}")
    if name:
        yield name, code


def read_report(text: str) -> Iterator[tuple[str, str, str]]:
    """(mangled name, architecture, registers and spills) from ptxas -v."""
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
    """By mangled name, through c++filt where there is one."""
    if not shutil.which("c++filt"):
        return {n: n for n in names}
    said = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True
    ).stdout
    short = [
        re.sub(r"\(offtower::cuda::Reward\)|offtower::cuda::", "", line).partition("run_kernel<")[2]
        for line in said.splitlines()
    ]
    return {n: s.partition(">(")[0].rstrip() or n for n, s in zip(names, short, strict=True)}


def main() -> None:
    tool = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    wrong = False
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
        codes = dict(read_code(dump.splitlines()))
        plain = readable([*codes])
        for name, code in codes.items():
            products = ", ".join(f"{n} of {w} columns" for w, n in sorted(code.products.items()))
            print(
                f"{plain[name]}: {facts.get(name, 'no report')}; {code.instructions} instructions, "
                f"{code.local} of local memory; products: {products or 'none'}, {code.waits} waits"
            )
            for what in code.too_early:
                print(f"    TOO EARLY: {what}")
            wrong |= bool(code.too_early)
        for code_name, name in serialized:
            print(f"    {code_name}: products wait for one another in {name}")
            wrong = True
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()

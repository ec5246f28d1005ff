"""Check tracked text files against the project's vocabulary.

    python tools/check_wording.py [FILE ...]

Three lists are checked: words that the prose rules replace (below), British spellings (below), and
the synonyms in the last column of the tables in docs/glossary.md. Exit code 1 and one line per
finding. A line with "wording: keep" is not checked.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {
    ".py",
    ".pyi",
    ".md",
    ".yaml",
    ".yml",
    ".toml",
    ".j2",
    ".css",
    ".h",
    ".cpp",
    ".cu",
    ".cuh",
    ".sh",
}
EXEMPT = {"tools/check_wording.py", "docs/glossary.md", "LICENSE"}

REPLACED = {
    r"so-manieth": "every k-th",
    r"vouch(es|ed|ing)?": "support, cover",
    r"hangs? together": "are correlated",
    r"as good as never": "almost never",
    r"(in the )?order of belief|beliefs?": "order of preference",
    r"(is|are|was|were|be|being) told": "is reported",
    r"falls? silent": "is missing",
    r"judg(e|es|ed|ing|ement|ment)s?": "evaluate, evaluation",
    r"landmarks?": "baseline",
    r"sharpness": "inverse temperature",
    r"price (of|on) (the )?(exact )?(kl|entropy)": "coefficient of",
    r"known_policy": "reference_policy",
    r"ModelRoom|StepPlace|ExactAtTimes|LogWatch|SupportWatch": "see docs/glossary.md",
    r"HeuristicWatch|SelectionKeeper|LoggingGathered|NO_MASS": "see docs/glossary.md",
    r"before_products": "warpgroup_arrive",
    r"give_registers|take_registers": "warpgroup_reg_dealloc, warpgroup_reg_alloc",
    r"copy_box": "tma_load",
}
BRITISH = {
    r"behaviours?": "behavior",
    r"(re|de)?normalis(e|es|ed|ing|ation)": "normalize",
    r"regularis(e|es|ed|ing|ation|er|ers)": "regularize",
    r"(un|pre)?initialis(e|es|ed|ing|ation)": "initialize",
    r"optimis(e|es|ed|ing|ation|er|ers)": "optimize",
    r"maximis(e|es|ed|ing|ation)|minimis(e|es|ed|ing|ation|er)": "maximize, minimize",
    r"generalis(e|es|ed|ing|ation)|specialis(e|es|ed|ing|ation)": "generalize, specialize",
    r"synchronis(e|es|ed|ing|ation)|serialis(e|es|ed|ing|ation)": "synchronize, serialize",
    r"materialis(e|es|ed|ing)|parametris(e|es|ed|ing|ation)|vectoris(e|es|ed|ing)": "-ize",
    r"recognis(e|es|ed|ing)|summaris(e|es|ed|ing)|randomis(e|es|ed|ing)": "-ize",
    r"studentis(e|es|ed|ing)|standardis(e|es|ed|ing)|organis(e|es|ed|ing|ation)": "-ize",
    r"(re)?cent(re|red|ring)": "center",
    r"colou?rs?(?<!color)(?<!colors)": "color",
    r"neighbours?|favou?rs?(?<!favor)(?<!favors)": "neighbor, favor",
    r"labell(ed|ing)|modell(ed|ing)|cancell(ed|ing)": "labeled, modeled, canceled",
    r"artefacts?|grey|whilst|programme": "American spelling",
}


def glossary_synonyms(path: Path) -> dict[str, str]:
    """Patterns of the synonyms that the glossary's table names, with the term to use."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 4 or set(cells[0]) <= set("-: "):
            continue
        for synonym in filter(None, (part.strip().strip("`") for part in cells[3].split(","))):
            if cells[0] != "term":
                found[re.escape(synonym)] = cells[0].strip("*`")
    return found


def findings(files: list[Path], rules: dict[str, str]) -> Iterator[str]:
    """One message per forbidden word, with its place and the word to use instead."""
    # A word may stand inside an identifier: an underscore ends a word, a letter does not.
    compiled = [
        (re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE), better)
        for pattern, better in rules.items()
    ]
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if "wording: keep" in line:
                continue
            for pattern, better in compiled:
                for match in pattern.finditer(line):
                    place = f"{path.relative_to(ROOT)}:{number}"
                    yield f"{place}: '{match.group()}': write '{better}'"


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def main(arguments: list[str]) -> int:
    files = [Path(name).resolve() for name in arguments] or tracked_files()
    checked = [
        path
        for path in files
        if path.suffix in SUFFIXES
        and path.is_file()
        and path.relative_to(ROOT).as_posix() not in EXEMPT
    ]
    rules = {**REPLACED, **BRITISH, **glossary_synonyms(ROOT / "docs/glossary.md")}
    messages = list(findings(checked, rules))
    print("\n".join(messages) or f"{len(checked)} files: no forbidden word")
    return 1 if messages else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

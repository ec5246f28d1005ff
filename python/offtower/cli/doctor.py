"""Report what is installed, what was built, and what is missing and why.

\b
Example:
  offtower doctor --json
  offtower doctor --selftest
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from offtower.cli.common import AsJson, escape, messages, print_json, verb

_REQUIRED = (
    "torch",
    "numpy",
    "pyarrow",
    "scikit-learn",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
    "safetensors",
    "jinja2",
    "matplotlib",
)
_EXTRAS = {
    "obp": "obp",
    "ray": "ray",
    "faiss-cpu": "ann",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}


EXIT_FAILED = 1
"""A check of the selftest failed."""


@verb
def doctor(
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="Check this machine: operators against float64 on every instruction set, a run "
            "that is killed and resumed, a damaged file. About ten seconds.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    if selftest:
        check(as_json)
        return
    from rich.table import Table

    facts = examine()
    if as_json:
        print_json(facts)
        return
    console = messages()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("offtower", facts["offtower"])
    table.add_row("python", f"{facts['python']} on {facts['machine']}, {facts['cores']} cores")
    for package, version in facts["packages"].items():
        table.add_row(package, version or "[red]missing[/]: pip install -e . again")
    for package, extra in facts["extras"].items():
        hint = f"not installed (extra '{extra['extra']}')"
        table.add_row(package, extra["version"] or hint)
    for backend, status in facts["backends"].items():
        table.add_row(f"operators: {backend}", status)
    table.add_row("training.device", facts["training_device"])
    table.add_row("objectives", ", ".join(facts["objectives"]))
    table.add_row("estimators", ", ".join(facts["estimators"]))
    console.print(table)


def check(as_json: bool) -> None:
    """Run the selftest, print each result, and exit with 1 where a check failed."""
    from offtower.selftest import run_selftest

    console, checks = messages(), []
    with tempfile.TemporaryDirectory() as folder:
        for one in run_selftest(Path(folder)):
            checks.append(one)
            mark = "[green]passed[/]" if one.passed else "[bold red]FAILED[/]"
            text = f"{mark} {one.name}: {escape(one.detail)} ({one.seconds:.1f} s)"
            console.print(text, soft_wrap=True)
    failed = [one.name for one in checks if not one.passed]
    if as_json:
        print_json({"checks": [vars(one) for one in checks], "passed": not failed})
    elif failed:
        console.print(
            f"{len(failed)} of {len(checks)} checks failed. Reinstall offtower; if that does not "
            "help, report this output together with that of 'offtower doctor --json'"
        )
    if failed:
        raise typer.Exit(EXIT_FAILED)


def examine() -> dict[str, Any]:
    """Return what the verb prints, as JSON values."""
    import offtower
    from offtower.evaluation.estimators import ESTIMATORS
    from offtower.objectives import OBJECTIVES
    from offtower.ops import available_backends, backend_status
    from offtower.training.device import auto_device_status

    return {
        "offtower": offtower.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in _REQUIRED},
        "extras": {
            name: {"version": _version(name), "extra": extra} for name, extra in _EXTRAS.items()
        },
        "available_backends": list(available_backends()),
        "backends": backend_status(),
        "training_device": auto_device_status(),
        "objectives": sorted(OBJECTIVES),
        "estimators": sorted(ESTIMATORS),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

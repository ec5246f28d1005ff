"""Report what is installed, what was built, and what is missing and why.

\b
Example:
  offtower doctor --json
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from rich.table import Table

from offtower.cli.common import AsJson, messages, print_json, verb

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


@verb
def doctor(as_json: AsJson = False) -> None:
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

"""What a command imports before it has anything to do, which is what a user waits for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    *("torch", "numpy", "pyarrow", "pandas", "polars", "scipy", "sklearn", "yaml", "safetensors"),
    *("matplotlib", "jinja2", "ray", "faiss", "obp", "onnx", "mlflow", "rich"),
    *("starlette", "uvicorn", "prometheus_client"),
)
"""Without pydantic, which typer itself imports to parse arguments."""

_HELP = """
import contextlib, io, json, sys
from offtower.cli import app
import typer
heavy = json.loads(sys.argv[1])
found = {}
for verb in ["", *typer.main.get_command(app).commands]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        app([*([verb] if verb else []), "--help"])
    assert "Usage: " in text.getvalue(), verb
    found[verb] = [name for name in heavy if name in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """Heavy modules that each verb's --help, or one before it, has imported."""
    command = [sys.executable, "-c", _HELP, json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_help_imports_no_heavy_module(imported: dict[str, list[str]]) -> None:
    assert len(imported) >= 12 and "" in imported and "search" in imported
    assert {verb: names for verb, names in imported.items() if names} == {}

"""Commands without what takes most of their time, for tests of other things.

`tests/retrieval/test_export.py` has the graphs of an export, `tests/evaluation/test_report.py` the
charts of a report, and the quickstart's test both commands as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def without_graphs() -> Iterator[None]:
    """Let exports have no graphs of the context tower for other runtimes."""
    facts = {"program": None, "onnx": None, "reason": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offtower.retrieval.export.write_graphs", lambda *_, **__: dict(facts))
        yield


@contextmanager
def without_charts() -> Iterator[None]:
    """Let reports have no charts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offtower.evaluation.report.plots.both", lambda chart: "")
        yield

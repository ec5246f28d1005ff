"""Commands of these tests draw no charts and trace no graphs, but in the quickstart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lighter import without_charts, without_graphs


@pytest.fixture(scope="module", autouse=True)
def lighter() -> Iterator[None]:
    with without_charts(), without_graphs():
        yield

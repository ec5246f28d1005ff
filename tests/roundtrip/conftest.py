from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.roundtrip.configurations import FEW, FORMS
from tests.roundtrip.loop import Loop

MakeLoop = Callable[[str, int], Loop]


@pytest.fixture(scope="session")
def loop_of(tmp_path_factory: pytest.TempPathFactory) -> MakeLoop:
    """Loops by forms of eligible items and number of items, each made at its first use."""
    made: dict[tuple[str, int], Loop] = {}

    def loop(forms: str, items: int) -> Loop:
        if (forms, items) not in made:
            folder = tmp_path_factory.mktemp("roundtrip")
            made[forms, items] = Loop.make(folder, items, {**FORMS, "few": FEW}[forms])
        return made[forms, items]

    return loop

from __future__ import annotations

from typing import Any

import pytest

from offtower.data import CatalogueSchema, FeatureSpec, LogSchema
from offtower.errors import ConfigError
from tests.data.conftest import make_schema


def test_round_trips() -> None:
    schema = make_schema()
    assert LogSchema.from_dict(schema.to_dict()) == schema
    items = CatalogueSchema(features=(FeatureSpec(name="x", kind="vector", dim=8),))
    assert CatalogueSchema.from_dict(items.to_dict()) == items
    assert schema.columns[:5] == ("age", "taste", "country", "tags", "action")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"psscore": "p"}, "unknown key 'psscore'; did you mean 'pscore'?"),
        ({"reward_range": [1, 0]}, "low < high"),
        ({"reward_range": [0, float("inf")]}, "two finite numbers"),
        ({"context": [{"name": "x", "kind": "number"}]}, "context.0.kind"),
        ({"context": [{"name": "x"}]}, "'context.0.kind' is required"),
        ({"context": [{"name": "x", "kind": "numeric", "dim": 2}]}, "'dim' is for vectors"),
        ({"context": [{"name": "x", "kind": "numeric"}] * 2}, "'x' is named twice"),
    ],
)
def test_mistakes_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LogSchema.from_dict(content)
    assert message in str(caught.value)

"""Values that JSON can represent."""

from __future__ import annotations

from typing import Any


def finite(value: Any) -> Any:
    """Replace infinities and NaN in nested lists and dictionaries by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value

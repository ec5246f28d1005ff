"""What JSON can hold."""

from __future__ import annotations

from typing import Any


def finite(value: Any) -> Any:
    """`value` with infinities and NaN as None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value

"""Durations such as "7d", in microseconds."""

from __future__ import annotations

import re

from offtower.errors import ConfigError

_UNITS = {
    "us": 1,
    "ms": 10**3,
    "s": 10**6,
    "min": 60 * 10**6,
    "h": 3_600 * 10**6,
    "d": 86_400 * 10**6,
    "w": 7 * 86_400 * 10**6,
}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*")


def parse_duration(text: str, name: str) -> int:
    """Return the microseconds of a duration: a number and one of us, ms, s, min, h, d, w.

    Args:
        name: of the setting, for messages.

    Raises:
        ConfigError: it has another form.
    """
    found = _FORM.fullmatch(text)
    if found is None or found[2] not in _UNITS:
        raise ConfigError(
            f"{name} is '{text}', expected a number with a unit of {', '.join(_UNITS)}, such as 7d"
        )
    return round(float(found[1]) * _UNITS[found[2]])

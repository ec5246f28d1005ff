"""How every section treats what it is given."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", validate_default=True)
"""Unknown keys are errors; defaults are checked like given values."""

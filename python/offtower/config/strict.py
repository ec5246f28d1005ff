"""Validation settings of all sections."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", validate_default=True)
"""Unknown keys are errors, and defaults are validated."""

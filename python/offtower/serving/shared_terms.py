"""Terms of a batch that policies of one run share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offtower.ops import PolicyTerms


class SharedTerms:
    """Terms of a batch, computed once for policies that serve the same scores differently."""

    def __init__(self) -> None:
        # The operands are kept, so that no other object takes over the id of one of them.
        self._found: dict[tuple[Any, ...], tuple[Any, PolicyTerms]] = {}

    def get(
        self,
        setting: tuple[Any, ...],
        operands: tuple[Any, ...],
        compute: Callable[[], PolicyTerms],
    ) -> PolicyTerms:
        """The terms of a setting on these very operands."""
        key = (*setting, *map(id, operands))
        if key not in self._found:
            self._found[key] = (operands, compute())
        return self._found[key][1]

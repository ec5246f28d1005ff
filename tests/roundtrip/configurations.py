"""Ways to serve that are sent through the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offtower.data.simulate import EligibilitySettings

ITEMS = 2000
FORMS: dict[str, EligibilitySettings | None] = {
    "all items": None,
    "regions": EligibilitySettings(regions=4),
    "days": EligibilitySettings(days=10),
    "seen": EligibilitySettings(seen=30),
    "candidates": EligibilitySettings(candidates=60),
    "regions, seen": EligibilitySettings(regions=4, seen=30),
    "all forms": EligibilitySettings(regions=4, days=20, seen=10, candidates=60),
}
FEW = EligibilitySettings(regions=2, seen=2)
"""For 8 items."""


@dataclass(frozen=True)
class Configuration:
    """A served policy.

    Attributes:
        forms: of eligible items.
        k: items of a round.
        perplexity: of the softmax over all items; None is temperature 1.
        uniform, top, mode: as in `ServingConfig`.
        draws: how the retriever draws; with "softmax" an index is opened too.
    """

    forms: str = "all items"
    k: int = 1
    perplexity: float | None = None
    uniform: float = 0.0
    top: int | None = None
    mode: Literal["sample", "top_k"] = "sample"
    draws: Literal["exact", "softmax"] = "exact"

    def __str__(self) -> str:
        parts = [self.forms, f"k {self.k}"]
        if self.perplexity is not None:
            parts.append(f"perplexity {self.perplexity:g}")
        if self.uniform > 0.0:
            parts.append(f"uniform {self.uniform:g}")
        if self.top is not None:
            parts.append(f"top {self.top}")
        if self.mode == "top_k":
            parts.append(self.mode)
        return ", ".join([*parts, self.draws])


QUICK = [
    Configuration(),
    Configuration(draws="softmax"),
    Configuration(k=3, draws="softmax"),
    Configuration(k=10),
]

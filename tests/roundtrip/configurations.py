"""Ways to serve that are sent through the loop."""

from __future__ import annotations

import itertools
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


def _all() -> list[Configuration]:
    found = [
        Configuration(forms, k, perplexity, uniform, top)
        for forms, k, perplexity, (uniform, top) in itertools.product(
            FORMS,
            (1, 3, 10),
            (2.0, 20.0, 200.0, 1000.0),
            ((0.0, None), (0.1, None), (0.05, 25)),
        )
    ]
    found += [Configuration(forms, k, top=25) for forms in FORMS for k in (1, 3)]
    found += [Configuration(forms, k, mode="top_k") for forms in FORMS for k in (1, 10)]
    found += [
        Configuration(forms, k, perplexity, uniform, draws="softmax")
        for forms, k, perplexity, uniform in itertools.product(
            ("all items", "regions, seen"), (1, 3, 10), (2.0, 200.0), (0.0, 0.1)
        )
    ]
    return found


CONFIGURATIONS = _all()
"""304 of them."""

QUICK = [
    Configuration(),
    Configuration(k=3, perplexity=2.0, uniform=0.1),
    Configuration(k=10, perplexity=200.0, top=25),
    Configuration(k=3, perplexity=1000.0, draws="softmax"),
    Configuration("all forms", k=1, perplexity=2.0, uniform=0.1),
    Configuration("all forms", k=10, perplexity=2.0),
    Configuration("all forms", k=3, perplexity=20.0, uniform=0.05, top=25),
    Configuration(k=10, mode="top_k"),
]
"""A few of each kind."""

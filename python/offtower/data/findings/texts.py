"""Texts that differ by spaces around them, or by case only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    as_array,
    category_values,
    hash_values,
    is_list,
    is_text,
)
from offtower.data.findings.base import EXAMPLES, Check, Finding, LogFacts, LogPart

_LIMIT = 10_000
"""Folded texts of a column that are kept; beyond, a hash sample of them."""


@dataclass(frozen=True, eq=False)
class Variants:
    """Up to two spellings of each text without case and spaces, of a hash sample of them.

    Texts are kept whose folded form has a hash that begins with `shift` zero bits, so that all
    spellings of a text are in the sample or none is.
    """

    spellings: dict[int, tuple[str, ...]]
    shift: int = 0

    @classmethod
    def of(cls, values: pa.Array) -> Variants:
        """Collect distinct texts."""
        folded = pc.utf8_lower(pc.utf8_trim_whitespace(values))
        found: dict[int, tuple[str, ...]] = {}
        keys: NDArray[np.uint64] = hash_values(folded)
        # Only what the sample can keep is made into Python objects.
        shift = max(0, int(np.ceil(np.log2(max(1, len(values)) / _LIMIT))))
        kept = np.flatnonzero(_kept(keys, shift))
        texts = values.take(pa.array(kept)).to_pylist()
        for key, text in zip(keys[kept].tolist(), texts, strict=True):
            found[key] = _joined(found.get(key, ()), (text,))
        return cls(found, shift)._bounded()

    def merge(self, other: Variants) -> Variants:
        """Merge."""
        shift = max(self.shift, other.shift)
        one, two = self._above(shift), other._above(shift)
        found = dict(one.spellings)
        for key, texts in two.spellings.items():
            found[key] = _joined(found.get(key, ()), texts)
        return Variants(found, shift)._bounded()

    def several(self) -> list[tuple[str, ...]]:
        """Texts with more than one spelling, in alphabetical order."""
        return sorted(texts for texts in self.spellings.values() if len(texts) > 1)

    def _above(self, shift: int) -> Variants:
        if shift == self.shift:
            return self
        return Variants({k: t for k, t in self.spellings.items() if k >> (64 - shift) == 0}, shift)

    def _bounded(self) -> Variants:
        found = self
        while len(found.spellings) > _LIMIT:
            found = found._above(found.shift + 1)
        return found


@dataclass(frozen=True)
class Spellings(Check):
    """Spellings of ids and categories.

    Attributes:
        variants: by column.
        spaced: by column, rows with spaces around the text, and examples.
    """

    variants: dict[str, Variants]
    spaced: dict[str, tuple[int, tuple[str, ...]]]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        found = cls({}, {})
        for name in text_columns(part):
            counts = _counts(part.good.column(name))
            values = counts.field("values")
            trimmed = pc.utf8_trim_whitespace(values)
            spaced = pc.not_equal(values, trimmed)
            rows = pc.sum(counts.field("counts").filter(spaced)).as_py() or 0
            examples = tuple(repr(t) for t in values.filter(spaced)[:EXAMPLES].to_pylist())
            found.variants[name] = Variants.of(values)
            found.spaced[name] = (rows, examples)
        return found

    def merge(self, other: Self) -> Self:
        merged = type(self)(dict(self.variants), dict(self.spaced))
        for name, variants in other.variants.items():
            mine = merged.variants.get(name)
            merged.variants[name] = variants if mine is None else mine.merge(variants)
        for name, (rows, examples) in other.spaced.items():
            before, first = merged.spaced.get(name, (0, ()))
            both = tuple(dict.fromkeys(first + examples))
            merged.spaced[name] = (before + rows, both[:EXAMPLES])
        return merged

    def findings(self, facts: LogFacts) -> list[Finding]:
        found = []
        for name, (rows, examples) in self.spaced.items():
            if rows:
                found.append(
                    Finding(
                        "warning",
                        "spaces",
                        f"column '{name}' has spaces around its text in {rows:,} rows, which makes "
                        "another value of it",
                        {"rows": rows},
                        examples,
                        "remove the spaces where the file is written",
                    )
                )
        for name, variants in self.variants.items():
            several = variants.several()
            by_case = [t for t in several if len({one.strip() for one in t}) > 1]
            if by_case:
                about = "about " if variants.shift else ""
                found.append(
                    Finding(
                        "warning",
                        "case",
                        f"{about}{len(by_case) << variants.shift:,} values of column '{name}' "
                        "differ from another one by case only, and count as different",
                        {"values": len(by_case) << variants.shift},
                        tuple(" / ".join(map(repr, texts)) for texts in by_case[:EXAMPLES]),
                        "write each value in one spelling",
                    )
                )
        return found


def text_columns(part: LogPart) -> list[str]:
    """Names of the columns with ids, categories and bags that hold text."""
    schema = part.schema
    names = [schema.action, schema.user_id, schema.behavior_policy]
    names += [spec.source for spec in schema.context if spec.kind in ("category", "bag")]
    return [
        name for name in dict.fromkeys(n for n in names if n is not None) if _is_text(part, name)
    ]


def _is_text(part: LogPart, name: str) -> bool:
    kind = part.good.schema.field(name).type
    return is_text(kind.value_type if is_list(kind) else kind)


def _counts(column: pa.ChunkedArray) -> pa.Array:
    """Distinct texts and their numbers, without null."""
    array = as_array(column)
    if is_list(array.type):
        array = array.flatten()
    return pc.value_counts(pc.drop_null(category_values(array)))


def _kept(keys: NDArray[np.uint64], shift: int) -> NDArray[np.bool_]:
    if shift == 0:
        return np.ones(len(keys), dtype=bool)
    kept: NDArray[np.bool_] = keys >> np.uint64(64 - shift) == 0
    return kept


def _joined(one: tuple[str, ...], two: tuple[str, ...]) -> tuple[str, ...]:
    """Two of both's spellings that differ by more than spaces, where there are such."""
    return tuple(sorted(dict.fromkeys(one + two)))[:4]

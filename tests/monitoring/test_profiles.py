"""Distributions of features: their samples, their distances, and the errors of these."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from offtower.data import FeatureSpec, LogSchema, profile
from offtower.data.profile import ColumnProfile, LogProfile
from offtower.monitoring.drift import compare_profiles

SPECS = (
    FeatureSpec("age", "numeric"),
    FeatureSpec("country", "category"),
    FeatureSpec("tags", "bag"),
    FeatureSpec("vector", "vector"),
    FeatureSpec("seen", "history"),
)


def table(rows: int, seed: int, shift: float = 0.0) -> pa.Table:
    rng = np.random.default_rng(seed)
    countries = rng.choice(["FR", "DE", "US"], rows, p=[0.5, 0.3, 0.2]).tolist()
    return pa.table(
        {
            "age": rng.normal(size=rows) + shift,
            "country": pa.array(countries, mask=rng.random(rows) < 0.1),
            "tags": [[f"t{j}" for j in range(k)] for k in rng.integers(0, 4, rows)],
            "vector": [one.tolist() for one in rng.normal(size=(rows, 3)).astype(np.float32)],
            "seen": [list(range(k)) for k in rng.integers(0, 3, rows)],
            "user": rng.integers(0, max(1, rows // 3), rows),
        }
    )


def profile_of(*tables: pa.Table, schema: LogSchema | None = None) -> LogProfile:
    return LogProfile.of(SPECS, tables, schema or LogSchema(SPECS))


@settings(max_examples=15, deadline=None)
@given(cut=st.lists(st.integers(1, 199), max_size=4, unique=True), users=st.booleans())
def test_a_profile_does_not_depend_on_how_rows_are_cut(cut: list[int], users: bool) -> None:
    whole, schema = table(200, 1), LogSchema(SPECS, user_id="user" if users else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "SIZE", 40)
        edges = [0, *sorted(cut), 200]
        parts = [whole.slice(a, b - a) for a, b in itertools.pairwise(edges)]
        one, other = profile_of(whole, schema=schema), profile_of(*parts, schema=schema)
    assert one.units == other.units == 40
    assert one.to_dict() == other.to_dict()


def test_every_user_counts_once() -> None:
    rows = pa.table({"age": [1.0] * 99 + [0.0], "user": ["heavy"] * 99 + ["light"]})
    specs = SPECS[:1]
    found = LogProfile.of(specs, [rows], LogSchema(specs, user_id="user"))
    quantiles = found.columns["age"].quantiles
    assert found.units == 2 and quantiles is not None and quantiles.tolist() == [0.0, 1.0]


def test_a_profile_survives_json() -> None:
    found = profile_of(table(3000, 2))
    again = LogProfile.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()
    assert set(found.columns) == {
        *("age", "country", "tags", "tags (values)", "vector (norm)", "vector (projection)"),
        *("seen", "seen (values)"),
    }
    country = found.columns["country"]
    assert country.buckets is not None and abs(country.buckets[0] / 3000 - 0.1) < 0.03
    assert abs(country.common["FR"] - 0.45) < 0.05


def test_the_distance_of_numbers_is_that_of_kolmogorov_and_smirnov() -> None:
    before, now = table(900, 3), table(700, 4, shift=0.3)
    found = compare_profiles(profile_of(before), profile_of(now), 0.01)
    age = next(one for one in found if one.name == "age")
    truth = ks_2samp(before["age"].to_numpy(), now["age"].to_numpy()).statistic
    assert abs(age.distance - truth) < 1e-6
    # The sources' own distance: 2 Phi(0.15) - 1 = 0.119.
    assert age.low < 0.119 < age.distance + (age.distance - age.low)


def test_bounds_are_wrong_as_often_as_stated() -> None:
    """400 pairs of logs of one source, four columns each: the error over columns is 0.2."""
    rng, wrong, trials, delta = np.random.default_rng(5), 0, 400, 0.2
    for _ in range(trials):
        logs = []
        for n in (60, 90):
            columns = {
                f"number {j}": ColumnProfile.of(pa.chunked_array([rng.normal(size=n)]))
                for j in range(2)
            }
            for j in range(2):
                codes = rng.integers(0, 3, n)
                buckets = np.bincount(codes, minlength=33).astype(np.int64)
                columns[f"class {j}"] = ColumnProfile(None, buckets, {})
            logs.append(LogProfile(n, columns))
        wrong += any(one.low > 0.0 for one in compare_profiles(logs[0], logs[1], delta))
    # Binomial: 4 standard errors above the stated rate.
    assert wrong <= trials * delta + 4.0 * (trials * delta * (1.0 - delta)) ** 0.5


def test_large_changes_are_found() -> None:
    reference = profile_of(table(4000, 6))
    changed = table(4000, 7, shift=2.0)
    changed = changed.set_column(1, "country", pa.array(["ES"] * 4000))
    low = {one.name: one for one in compare_profiles(reference, profile_of(changed), 0.01)}
    assert low["age"].low > 0.5 and low["country"].low > 0.5
    assert low["vector (norm)"].low == 0.0
    assert "'ES' 0.0%, now 100.0%" in low["country"].change
    assert low["age"].stability_index > 1.0 > 0.1 > low["vector (norm)"].stability_index


def test_numbers_that_became_categories_are_as_far_as_can_be() -> None:
    number = ColumnProfile.of(pa.chunked_array([[1.0, 2.0]]))
    category = ColumnProfile.of(pa.chunked_array([["a", "b"]]))
    found = compare_profiles(LogProfile(2, {"x": number}), LogProfile(2, {"x": category}), 0.01)
    assert found[0].low == 1.0

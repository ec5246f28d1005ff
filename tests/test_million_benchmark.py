"""Tests of the million-item benchmark: worlds, exact values, the oracle, resumption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from offtower.benchmarks import Settings
from offtower.benchmarks.million import costs, suite
from offtower.benchmarks.million.methods import METHODS
from offtower.benchmarks.million.oracle import oracle
from offtower.benchmarks.million.world import REWARDED, make_world
from offtower.benchmarks.peers import Unavailable
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.errors import ConfigError


def settings(out: Path, **change: object) -> Settings:
    given: dict[str, object] = {
        "items": (300,),
        "dim": 32,
        "batch": 1024,
        "steps": 1,
        "peers": True,
        "out": out,
        "minutes": 0.005,
        "rows": 3000,
        "worlds": ("ids",),
        "methods": ("torch_log_q", "oracle"),
        **change,
    }
    return Settings(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_ids_hide_their_share_of_the_items_parts(share: float) -> None:
    """The parts keep their variance, and a share of it is not in the features' means.

    Ratios of variances of 20,000 normal numbers in 9 places, within 6 standard errors of sqrt(2 /
    20,000): a false alarm below 1e-7.
    """
    items = 20_000
    plain = SimulatedWorld(items, WorldSettings(intercept=-2.0))
    world = SimulatedWorld(items, WorldSettings(intercept=-2.0, id_share=share))
    assert world.hidden is not None and plain.hidden is None
    margin = 6 * (2 / items) ** 0.5
    part = torch.cat([world.item_latent, world.item_logit[:, None] + 2.0], 1)
    known = torch.cat([world.hidden.latent, world.hidden.logit[:, None] + 2.0], 1)
    of_features = torch.cat([plain.item_latent, plain.item_logit[:, None] + 2.0], 1)
    size = torch.cat([world.hidden.latent_size, torch.tensor([world.hidden.logit_size])])
    torch.testing.assert_close(known, (1 - share) ** 0.5 * of_features)
    ratio = (part - known).var(0) / size.square()
    assert ((ratio - 1).abs() < margin).all()
    ratio = size.square() / (share * of_features.var(0))
    assert ((ratio - 1).abs() < margin).all()
    names = [spec.name for spec in world.catalogue_schema.features]
    assert names == (["id"] if share == 1.0 else ["action_context", "id"])
    assert set(world.catalogue_table().column_names) >= {"item_id"}


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_the_share_of_ids_is_checked(share: float) -> None:
    with pytest.raises(ConfigError, match="id_share must lie in"):
        WorldSettings(id_share=share)


@pytest.mark.parametrize("name", ["features", "ids", "both"])
def test_about_one_row_in_a_hundred_is_rewarded(name: str) -> None:
    """Of 20,000 rows, within what the rows and the 20,000 of the calibration allow at 1e-6."""
    world = make_world(name, 500, 20_000, seed=1)
    found = float(world.arrays.reward.mean())
    margin = stats.norm.isf(5e-7) * (2 * REWARDED / 20_000) ** 0.5
    assert abs(found - REWARDED) < margin
    assert (world.arrays.item is None) == (name == "ids")
    assert world.arrays.has_ids == (name != "features")


def test_values_are_those_of_enumeration() -> None:
    world = make_world("both", 200, 300, seed=2)
    g = torch.Generator().manual_seed(1)
    u, v = torch.randn(world.contexts.num_rows, 3, generator=g), torch.randn(200, 3, generator=g)
    found = world.value(u, v)
    wide = world.simulated.reward_model(world.contexts)
    assert wide.item_bias is not None
    q = torch.sigmoid(wide.context @ wide.item.T + wide.item_bias)
    pi = torch.softmax(u.double() @ v.double().T, 1)
    assert found.softmax == pytest.approx(float((pi * q).sum(1).mean()), rel=1e-5)
    best = (u @ v.T).argmax(1)
    assert found.greedy == pytest.approx(float(q.gather(1, best[:, None]).mean()), rel=1e-9)


def test_the_oracle_is_the_posterior_mode_of_each_item() -> None:
    """Against scipy, for the item with the most rows and for one without rows."""
    world = make_world("both", 100, 4000, seed=3)
    context, item, bias = oracle(world)
    hidden = world.simulated.hidden
    assert hidden is not None
    torch.testing.assert_close(
        context.double(), world.simulated.context_latent(world.contexts), rtol=1e-5, atol=1e-6
    )
    count = torch.bincount(world.arrays.action, minlength=100)
    number = int(count.argmax())
    rows = (world.arrays.action == number).numpy()
    latent = world.simulated.context_latent(world.log.table).numpy()[rows]
    x = np.concatenate([latent, np.ones((len(latent), 1))], 1)
    y = world.arrays.reward.numpy()[rows]
    mean = np.append(hidden.latent[number].numpy(), hidden.logit[number])
    size = np.append(hidden.latent_size.numpy(), hidden.logit_size)

    def negative(part: np.ndarray) -> float:
        logit = x @ part
        penalty = np.square((part - mean) / size).sum() / 2
        return float((np.logaddexp(0.0, logit) - y * logit).sum() + penalty)

    wanted = optimize.minimize(negative, mean, method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose(np.append(item[number], bias[number]), wanted, atol=2e-3)
    for unseen in (count == 0).nonzero()[:, 0].tolist():
        torch.testing.assert_close(item[unseen].double(), hidden.latent[unseen], atol=1e-6, rtol=0)


def test_features_need_no_oracle() -> None:
    with pytest.raises(Unavailable, match="the optimum is its oracle"):
        oracle(make_world("features", 50, 200, seed=1))


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    said: list[str] = []
    first = suite.run(settings(tmp_path, methods=("oracle",), say=said.append))
    again = suite.run(settings(tmp_path, say=said.append))
    assert sum("simulated" in line for line in said) == 2
    found = again["worlds"]["ids"]["methods"]
    assert found["oracle"] == first["worlds"]["ids"]["methods"]["oracle"]
    marks = again["worlds"]["ids"]["baselines"]
    assert 0.0 < marks["logging"] < found["oracle"]["mean"] <= marks["optimum"]
    said.clear()
    suite.run(settings(tmp_path, say=said.append))
    assert not any("simulated" in line for line in said)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "ids-oracle-0.json",
        "ids-torch_log_q-0.json",
        "summary.json",
        "table.txt",
        "values.svg",
    }
    assert json.loads((tmp_path / "summary.json").read_text())["items"] == 300
    with pytest.raises(ConfigError, match="is of a run with items 300, rows 3000, minutes"):
        suite.run(settings(tmp_path, rows=4000))


@pytest.mark.parametrize("change", [{"worlds": ("none",)}, {"methods": ("none",)}])
def test_unknown_names_are_refused(tmp_path: Path, change: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"unknown (world|method) 'none'; known: "):
        suite.run(settings(tmp_path, **change))


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("auto", "oracle")])
@pytest.mark.parametrize("world", ["features", "both"])
def test_learners_stop_and_embed_contexts_and_items(name: str, world: str) -> None:
    """Or name the package that they need."""
    made = make_world(world, 200, 5_000, seed=4)
    try:
        learned = METHODS[name](made, 0.1, 0)
    except Unavailable as reason:
        assert "is not installed" in str(reason)
        return
    assert learned.context.shape == (made.contexts.num_rows, learned.item.shape[1])
    assert len(learned.item) == 200
    assert learned.item.isfinite().all() and learned.context.isfinite().all()
    assert float(learned.item.std(0).max()) > 0.0


@pytest.mark.parametrize(
    ("values", "wanted"),
    [((0.1, 0.95, 1.0, 1.0), 2.0), ((0.9, 0.0, 0.0, 0.0), 1.0), ((0.1, 0.2, 0.3, 0.4), 16.0)],
)
def test_a_policy_is_useful_from_nine_tenths_of_the_final_value(
    values: tuple[float, ...], wanted: float
) -> None:
    found = dict(zip(costs.SHARES, values, strict=True))
    assert costs.useful_seconds(1.0, 16.0, lambda share: (found[share], 16.0 * share)) == wanted


def test_the_table_has_medians_and_marks_what_is_not_known() -> None:
    line = {"world": "ids", "method": "auto", "value": 0.5, "useful_seconds": 2.0, "facts": {}}
    lines = [{**line, "seconds": seconds} for seconds in (4.0, 6.0, 50.0)]
    facts = {"rows_per_second": 12345.6}
    counted = {**line, "method": "counted", "seconds": 1.0, "peak_gib": 1.25, "facts": facts}
    rows = [row.split() for row in costs.table([*lines, counted])]
    assert rows[-2] == ["auto", "6.0", "2.0", "-", "-"]
    assert rows[-1] == ["counted", "1.0", "2.0", "12,346", "1.25"]

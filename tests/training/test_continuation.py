"""Runs that go on from an earlier one: their weights, optimizer, logs and interruptions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from offtower.config import Config
from offtower.data import Catalogue, ParquetLog, write_log
from offtower.data.encoding import to_tensors
from offtower.data.ledger import LogLedger
from offtower.data.row_sketch import RowSketch
from offtower.data.schema import FeatureSpec
from offtower.errors import ConfigError, DataError, OfftowerError, RunError, StoppedError
from offtower.evaluation.held_out import not_held_out, with_copied_rows
from offtower.evaluation.run_loading import EvaluatedPolicy, open_run
from offtower.execution import Execution
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy
from offtower.models.towers import MLPBody
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.run_directory import RunDirectory
from offtower.training.checkpoints import CheckpointStore
from offtower.training.run import _fingerprint, train_run
from offtower.training.setup import TrainingSetup, build_setup
from offtower.training.trainer import Trainer
from offtower.training.workers import SINGLE_PROCESS
from tests.training.days import ROWS, Days, catalogue, log, write_days
from tests.training.test_resume import StopAfter, assert_same_policy

OPTIMIZERS = {
    "dense": (),
    "lazy_adamw": ("training.table_updates=lazy_adamw",),
    "rowwise_adagrad": ("training.table_updates=rowwise_adagrad",),
}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    return write_days(tmp_path_factory.mktemp("days"))


@pytest.fixture(scope="module")
def runs(days: Days, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of both days."""
    folder = tmp_path_factory.mktemp("runs")
    for day in range(2):
        train_run(days.config(day, folder))
    return folder


def begun(config: Config) -> tuple[TrainingSetup, Trainer]:
    """A run before its first step."""
    data = open_data(config, Progress())
    setup = build_setup(config, data, None, SINGLE_PROCESS, Progress())
    trainer = setup.trainer()
    trainer._start(False)
    return setup, trainer


def rows_of(policy: TwoTowerPolicy, side: str, feature: str) -> dict[str, Tensor]:
    """Rows of a table by value."""
    tower, encoding = getattr(policy, f"{side}_tower"), getattr(policy, f"{side}_encoding")
    weight = tower.bodies[0].encoder.embedding(feature).weight.detach()
    return dict(zip([None, *encoding.vocabulary(feature).to_pylist()], weight, strict=True))


TABLES = (("item", "item"), ("item", "brand"), ("context", "user"))


def test_known_rows_are_bit_equal_and_new_users_begin_as_unknown(days: Days, runs: Path) -> None:
    before, _ = load_policy(runs / "day-0" / "policy")
    policy = begun(days.config(1, runs, "name=x"))[0].policy
    for side, feature in TABLES:
        old, new = rows_of(before, side, feature), rows_of(policy, side, feature)
        for value in old.keys() & new.keys():
            assert torch.equal(old[value], new[value]), value
    users = rows_of(policy, "context", "user")
    assert "u0" not in users and torch.equal(users["u11"], users[None])
    items = rows_of(policy, "item", "item")
    assert set(items) == {None, *(f"i{n:02d}" for n in range(4, 24))}
    brands = rows_of(policy, "item", "brand")
    assert torch.equal(brands["b5"], brands[None]) and "b0" in brands
    state, old_state = policy.state_dict(), before.state_dict()
    for name, value in old_state.items():
        if "tables" not in name:
            assert torch.equal(value, state[name]), name


def test_new_items_start_from_a_regression_on_their_features(days: Days, runs: Path) -> None:
    before, _ = load_policy(runs / "day-0" / "policy")
    policy = begun(days.config(1, runs, "name=x"))[0].policy
    brands, ids = rows_of(policy, "item", "brand"), rows_of(policy, "item", "item")
    old = rows_of(before, "item", "item")
    table = catalogue(range(4, 24))
    shape = policy.item_encoding.encode(table)["shape"]
    design = np.column_stack(
        [shape, [brands[b].numpy() for b in table["brand"].to_pylist()], np.ones(20)]
    ).astype(np.float64)
    known = design[:16]
    target = np.array([old[v].numpy() for v in table["item"].to_pylist()[:16]], dtype=np.float64)
    square = known.T @ known
    penalty = 1e-3 * np.diag(square)[:-1].mean()
    ridge = np.diag([penalty] * (design.shape[1] - 1) + [1e-9 * 16])
    expected = design[16:] @ np.linalg.solve(square + ridge, known.T @ target)
    found = np.array([ids[v].numpy() for v in table["item"].to_pylist()[16:]])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = begun(days.config(1, runs, "name=x", "incremental.new_rows=unknown"))[0].policy
    ids = rows_of(plain, "item", "item")
    assert torch.equal(ids["i23"], ids[None])


def stepped(optimizer: str, value: dict[str, np.ndarray], gradient: np.ndarray) -> np.ndarray:
    """One step of the published rules in float64, from a state at its last step."""
    weight, rate = value["weight"] * (1.0 - 1e-3 * 1e-2), 1e-3
    if optimizer == "rowwise_adagrad":
        total = value["sum"] + np.square(gradient).mean(axis=1)
        return weight - rate * gradient / (np.sqrt(total) + 1e-8)[:, None]
    t = float(value["step"]) + 1.0
    first = 0.9 * value["exp_avg"] + 0.1 * gradient
    second = 0.999 * value["exp_avg_sq"] + 0.001 * np.square(gradient)
    scale = np.sqrt(second / (1.0 - 0.999**t)) + 1e-8
    return weight - rate * first / (1.0 - 0.9**t) / scale


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_first_step_is_one_of_the_mapped_state(
    optimizer: str, days: Days, tmp_path: Path
) -> None:
    """Known rows step from the earlier run's moments, new ones from none, in float64."""
    more = OPTIMIZERS[optimizer]
    train_run(days.config(0, tmp_path, *more))
    earlier = begun(days.config(0, tmp_path, "name=again", *more))[1]
    config = days.config(0, tmp_path, *more)
    fingerprint = _fingerprint(config, earlier._data)
    store = CheckpointStore(tmp_path / "day-0" / "checkpoints", fingerprint, 2)
    assert store.load_newest(earlier.policy, earlier._optimizer) is not None
    setup, trainer = begun(days.config(1, tmp_path, "name=x", *more))
    table, old = item_table(setup.policy), item_table(earlier.policy)
    assert setup.data.rows is not None
    origin = setup.data.rows.item["item"].origin
    tables = getattr(earlier._optimizer, "tables", None)
    state = (tables or earlier._optimizer).state[old.weight]
    value = {"weight": table.weight.detach().double().numpy()}
    for name, tensor in state.items():
        if tensor.dim() == 0:
            value[name] = tensor.double().numpy()
        else:
            rows = tensor.double().numpy()
            mapped = rows[np.maximum(origin, 0)]
            mapped[origin < 0] = 0.0
            value[name] = mapped
    if tables is not None:
        value["step"] = np.array(tables.steps)
    gradient = np.random.default_rng(0).normal(size=tuple(table.weight.shape))
    table.weight.grad = torch.from_numpy(gradient).float()
    trainer._optimizer.step()
    found = table.weight.detach().double().numpy()
    np.testing.assert_allclose(found, stepped(optimizer, value, gradient), atol=2e-7)


def test_evicted_rows_take_no_part_in_gradients(days: Days, runs: Path) -> None:
    """Gradients of a batch equal those of the earlier policy over the items that both know."""
    before, _ = load_policy(runs / "day-0" / "policy")
    before.train()
    setup, _ = begun(days.config(1, runs, "name=x"))
    table = log(40, range(4, 20), range(2, 10), seed=5)
    items, gradients = catalogue(range(4, 20)), []
    for policy in (before, setup.policy):
        policy.eval().zero_grad()
        context = to_tensors(policy.context_encoding.encode(table))
        item = to_tensors(policy.item_encoding.encode(items))
        scores = policy.embed_contexts(context) @ policy.item_tower(item)[0].T
        torch.log_softmax(scores, 1).square().mean().backward()
        found = {
            (feature, value): row
            for side, feature in TABLES
            for value, row in rows_of_gradient(policy, side, feature).items()
        }
        gradients.append(found)
    shared = gradients[0].keys() & gradients[1].keys()
    assert len(shared) > 16 + 3 + 8
    for key in shared:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=0, atol=1e-7)
    new = [row for key, row in gradients[1].items() if key not in shared]
    assert new and not any(row.any() for row in new)


def rows_of_gradient(policy: TwoTowerPolicy, side: str, feature: str) -> dict[str, Tensor]:
    tower, encoding = getattr(policy, f"{side}_tower"), getattr(policy, f"{side}_encoding")
    weight = tower.bodies[0].encoder.embedding(feature).weight
    return dict(zip([None, *encoding.vocabulary(feature).to_pylist()], weight.grad, strict=True))


def test_logs_of_ancestors_are_not_held_out(days: Days, runs: Path, tmp_path: Path) -> None:
    """Of the run before, and of the one before that; also as a copy in other files."""
    shutil.copytree(runs, tmp_path / "runs")
    more = (f"data.train={days.folder / 'fresh'}", f"data.catalogue={days.folder}/catalogue-1")
    write_log(days.folder / "fresh", [log(200, range(4, 24), range(2, 12), seed=9)], ROWS)
    train_run(days.config(2, tmp_path / "runs", *more))
    run = tmp_path / "runs" / "day-2"
    manifest = RunDirectory(run).manifest()
    assert manifest["generation"] == 2
    assert [Path(one["run"]).name for one in manifest["descends_from"]] == ["day-1", "day-0"]
    policy = {"new": evaluated(run)}
    for place, text in (
        ("fresh", "it was trained on this log"),
        ("log-1", "a policy that it started from was trained on this log"),
        ("log-0", "a policy that it started from was trained on this log"),
    ):
        opened = ParquetLog.open(days.folder / place)
        found = not_held_out(policy, opened.content, (), days.folder / place)
        assert text in found["new"]
    rows = ParquetLog.open(days.folder / "log-0").read_row_group(0)
    write_log(tmp_path / "copy", [rows], ROWS)
    copy = ParquetLog.open(tmp_path / "copy")
    assert not not_held_out(policy, copy.content, (), tmp_path / "copy")
    sketch = RowSketch.of([rows], ROWS)
    assert "other files" in with_copied_rows({}, policy, sketch, tmp_path / "copy")["new"]


def test_stopped_and_resumed_with_the_same_bits(days: Days, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "day-0", tmp_path / "day-0")
    config = days.config(1, tmp_path)
    for questions in (2, 5):
        with pytest.raises(StoppedError):
            train_run(config, resume=True, execution=Execution(interruption=StopAfter(questions)))
    train_run(config, resume=True)
    assert_same_policy(tmp_path / "day-1", runs / "day-1")


def test_another_earlier_policy_is_not_resumed(days: Days, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "day-0", tmp_path / "day-0")
    config = days.config(1, tmp_path)
    with pytest.raises(StoppedError):
        train_run(config, execution=Execution(interruption=StopAfter(2)))
    shutil.rmtree(tmp_path / "day-0")
    train_run(days.config(0, tmp_path, "seed=8"))
    with pytest.raises(RunError, match="another configuration or other data"):
        train_run(config, resume=True)


class Notes(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_what_was_done_is_said(days: Days, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "day-0", tmp_path / "day-0")
    shutil.rmtree(tmp_path / "day-0" / "checkpoints")
    notes = Notes()
    train_run(days.config(1, tmp_path), execution=Execution(progress=notes))
    text = "\n".join(notes.texts)
    assert "16 items stay, 4 are new, 4 left" in text
    assert "values of 'user': 8 known, 2 new, 2 removed" in text
    assert "4 new items start from their features" in text
    assert "the optimizer begins without state" in text and "no whole checkpoint" in text


def test_a_resumed_run_leaves_the_earlier_weights_alone(
    days: Days, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint has all weights and the optimizer's state."""
    shutil.copytree(runs / "day-0", tmp_path / "day-0")
    config = days.config(1, tmp_path)
    with pytest.raises(StoppedError):
        train_run(config, execution=Execution(interruption=StopAfter(2)))
    monkeypatch.setattr("offtower.training.setup.continue_run", None)
    train_run(config, resume=True)
    assert_same_policy(tmp_path / "day-1", runs / "day-1")


def test_copies_of_rows_behind_a_warm_start_are_found(
    days: Days, runs: Path, tmp_path: Path
) -> None:
    """Also of the rows that chose the epoch of the policy before the last one."""
    rows = log(200, range(20), range(10), seed=8)
    write_log(tmp_path / "chose", [rows], ROWS)
    write_log(tmp_path / "again", [rows.slice(0, 150)], ROWS)
    policy = ""
    for number in range(3):
        before = [f"training.warm_start={policy}"] if number else []
        validation = [f"data.validation={tmp_path / 'chose'}"] if not number else []
        train_run(days.config(0, tmp_path, f"name=w{number}", *before, *validation))
        policy = str(tmp_path / f"w{number}" / "policy")
    sketch = RowSketch.of([rows.slice(0, 150)], ROWS)
    found = with_copied_rows({}, {"new": evaluated(tmp_path / "w2")}, sketch, tmp_path / "again")
    assert "a policy that it started from was trained on" in found["new"]
    stored = RunDirectory(tmp_path / "w0").manifest()["validation_rows"]
    assert stored == RowSketch.of([rows], ROWS).to_dict()
    fresh = RowSketch.of([log(150, range(20), range(10), seed=10)], ROWS)
    assert not with_copied_rows({}, {"new": evaluated(tmp_path / "w2")}, fresh, tmp_path)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("objective.name=auto", ConfigError, "name an objective"),
        ("training.initialization=uniform", ConfigError, "sets the initial weights"),
        ("policy.embedding_dim=6", ConfigError, r"policy.embedding_dim \(4 -> 6\)"),
        ("incremental.from_run=nowhere", RunError, "'nowhere' is no run"),
        ("name=day-0", RunError, "the run itself"),
        ("incremental.replay.logs=[OWN]", DataError, "in common with data.train"),
        ("incremental.max_removed=0.1", DataError, "lacks 4 of the 20 items"),
    ],
)
def test_what_cannot_go_on_is_refused(
    change: str, kind: type[OfftowerError], message: str, days: Days, runs: Path
) -> None:
    change = change.replace("OWN", str(days.folder / "log-1"))
    with pytest.raises(kind, match=message):
        train_run(days.config(1, runs, "name=new", change))
    assert not (runs / "new").exists()


def test_an_unfinished_run_is_refused(days: Days, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "day-0", tmp_path / "day-0")
    shutil.rmtree(tmp_path / "day-0" / "policy")
    with pytest.raises(RunError, match=r"unfinished.*--resume"):
        train_run(days.config(1, tmp_path))
    assert not (tmp_path / "day-1").exists()


def test_a_log_with_other_features_is_refused(days: Days, runs: Path, tmp_path: Path) -> None:
    rows = log(20, range(4, 24), range(10), seed=1)
    rows = rows.set_column(0, "user", pa.array([[u] for u in rows["user"].to_pylist()]))
    bag = FeatureSpec(name="user", kind="bag")
    write_log(tmp_path / "log", [rows], replace(ROWS, context=(bag, ROWS.context[1])))
    with pytest.raises(
        DataError, match=r"'user' of the log has changed \(kind 'category' -> 'bag'"
    ):
        train_run(days.config(1, runs, "name=new", f"data.train={tmp_path / 'log'}"))


def item_table(policy: TwoTowerPolicy) -> nn.Embedding:
    body = policy.item_tower.bodies[0]
    assert isinstance(body, MLPBody)
    return body.encoder.embedding("item")


def evaluated(run: Path) -> EvaluatedPolicy:
    config = RunDirectory(run).load_config()
    opened = open_run(run, Catalogue.open(config.data.catalogue))
    return EvaluatedPolicy(opened, opened.config.serving)


def test_replayed_rows_are_recorded_and_admit_nothing(
    days: Days, runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "day-0", tmp_path / "day-0")
    older = days.folder / "log-0"
    replay = (f"incremental.replay.logs=['{older}']", "incremental.replay.share=0.3")
    config = days.config(1, tmp_path, *replay)
    with pytest.raises(StoppedError):
        train_run(config, execution=Execution(interruption=StopAfter(2)))
    train_run(config, resume=True)
    manifest = RunDirectory(tmp_path / "day-1").manifest()
    assert manifest["training_rows"] == 200 + round(0.3 / 0.7 * 200)
    contents = [ParquetLog.open(days.folder / f"log-{day}").content for day in (1, 0)]
    assert manifest["data_files"]["train"] == [file for one in contents for file in one.files]
    kinds = [
        entry.kind
        for entry in LogLedger(older).entries(contents[1].fingerprint)
        if entry.facts["run"] == str(tmp_path / "day-1")
    ]
    assert kinds == ["trained"]
    policy, _ = load_policy(tmp_path / "day-1" / "policy")
    assert "u0" not in rows_of(policy, "context", "user")

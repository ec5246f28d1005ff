"""benchmarks/movielens.py on a few made-up ratings."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.movielens import Ratings, Run, Task, loss_of, metrics, options_parser


def options(*more: str) -> argparse.Namespace:
    small = [
        "--width",
        "8",
        "--length",
        "6",
        "--batch-users",
        "8",
        "--negatives",
        "5",
        "--evaluate-every",
        "1",
        "--out",
        "-",
    ]
    return options_parser().parse_args(["ratings.dat", *small, *more])


@pytest.fixture
def ratings(tmp_path: Path) -> Ratings:
    rng = np.random.default_rng(1)
    path = tmp_path / "ratings.dat"
    path.write_text(
        "".join(
            f"{user}::{rng.integers(1, 30)}::5::{978300000 + rng.integers(0, 1000)}\n"
            for user in range(1, 21)
            for _ in range(rng.integers(4, 12))
        )
    )
    return Ratings.read(path)


@pytest.mark.parametrize("kind", ["transformer", "mean"])
def test_one_pass_is_the_sum_over_its_positions(ratings: Ratings, kind: str) -> None:
    """Each position's context is that of the history that ends there, at the next event's time."""
    task = Task(ratings, options("--encoder", kind, "--dropout", "0"))
    task.policy.eval()
    users = np.array([3, 0, 7])
    with torch.no_grad():
        context, target = task.positions(users)
        place = 0
        for user in users:
            first, last, _ = (part[user] for part in task.train)
            for end in range(first + 1, last + 1):
                part = tuple(np.array([one]) for one in (first, end, ratings.times[end]))
                one = task.encoded(part)
                torch.testing.assert_close(
                    task.policy.embed_contexts(one)[0], context[place], rtol=1e-4, atol=1e-5
                )
                assert int(target[place]) == int(task.of_item[end])
                place += 1
    assert place == len(context)


def test_a_stopped_run_goes_on_to_the_same_bits(ratings: Ratings, tmp_path: Path) -> None:
    whole = Run(Task(ratings, options()), tmp_path / "whole")
    lines = [whole.epoch(), whole.epoch()]
    Run(Task(ratings, options()), tmp_path / "parts").epoch()
    later = Run(Task(ratings, options()), tmp_path / "parts")
    line = later.epoch()
    assert line["epoch"] == 2 and line["loss"] == lines[1]["loss"]
    for name, value in whole.task.policy.state_dict().items():
        assert torch.equal(value, later.task.policy.state_dict()[name]), name
    assert line["all_items"] == lines[1]["all_items"]


def test_batches_hold_every_user_once(ratings: Ratings) -> None:
    task = Task(ratings, options("--batch-users", "3"))
    batches = task.batches(0)
    assert sorted(np.concatenate(batches)) == list(range(20))
    assert max(map(len, batches)) <= 3


def test_exact_and_sampled_losses_agree_when_all_items_are_drawn(ratings: Ratings) -> None:
    """20,000 draws of 29 items: the relative deviation of a normalizer is about .003."""
    users = np.arange(20)
    exact = Task(ratings, options("--negatives", "0", "--dropout", "0"))
    many = Task(ratings, options("--negatives", "20000", "--dropout", "0"))
    many.policy.load_state_dict(exact.policy.state_dict())
    with torch.no_grad():
        sampled, whole = float(loss_of(many, users, 1)), float(loss_of(exact, users, 1))
    assert sampled == pytest.approx(whole, rel=0.02)


def test_metrics() -> None:
    found = metrics(np.array([0, 9, 10, 300]))
    assert found["HR@10"] == 0.5 and found["HR@50"] == 0.75
    assert found["NDCG@10"] == pytest.approx((1 + 1 / np.log2(11)) / 4)

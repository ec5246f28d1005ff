"""Learning-rate schedule, averaged weights and warm starts, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from offtower.config import TrainingConfig
from offtower.training.schedule import LearningRate, WeightAverage, factor


def test_factor_rises_linearly_and_falls_to_zero() -> None:
    assert factor(0.0, 0.2, "linear") == 0.0
    assert factor(0.1, 0.2, "linear") == pytest.approx(0.5)
    assert factor(0.2, 0.2, "linear") == pytest.approx(1.0)
    assert factor(0.6, 0.2, "linear") == pytest.approx(0.5)
    assert factor(0.6, 0.2, "cosine") == pytest.approx(0.5)
    assert factor(1.0, 0.2, "cosine") == pytest.approx(0.0)
    assert factor(0.9, 0.2, "none") == 1.0


def test_rates_are_set_from_the_configured_ones() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    rate = LearningRate(TrainingConfig(decay="linear"), optimizer)
    for progress in (0.0, 0.5, 0.75):
        rate.at(progress)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 - progress))
    # A checkpoint brings new groups, with the rate of its step.
    optimizer.load_state_dict(optimizer.state_dict())
    rate.at(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_average_is_the_mean_of_the_last_steps() -> None:
    module = nn.Linear(2, 1)
    average = WeightAverage(module, share=0.5)
    kept = []
    for step in range(10):
        with torch.no_grad():
            module.weight.fill_(float(step))
        average.after_step(step / 10)
        if step / 10 >= 0.5:
            kept.append(step)
    again = WeightAverage(module, share=0.5)
    again.load_state(average.state())
    again.swap_in()
    np.testing.assert_allclose(module.weight.detach().numpy(), np.mean(kept), rtol=1e-6)
    again.swap_out()
    np.testing.assert_allclose(module.weight.detach().numpy(), 9.0)

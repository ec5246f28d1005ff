"""Schedules of learning rate and temperature, and weight averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offtower.config import TrainingConfig
from offtower.models.optimizer import JointOptimizer
from offtower.models.policy import TwoTowerPolicy


class LearningRate:
    """Warm-up and decay as a function of training progress.

    Args:
        settings: warm_up, decay.
        optimizer: the factor multiplies its groups' current rates.
    """

    def __init__(self, settings: TrainingConfig, optimizer: torch.optim.Optimizer) -> None:
        self._settings = settings
        self._optimizer = optimizer
        self._rates = [float(group["lr"]) for group in _groups(optimizer)]
        self._constant = settings.warm_up == 0.0 and settings.decay == "none"

    def at(self, progress: float) -> None:
        """Set the rates for progress in [0, 1)."""
        if self._constant:
            return
        now = factor(progress, self._settings.warm_up, self._settings.decay)
        # Groups are looked up each time, since loading a checkpoint replaces them.
        for group, rate in zip(_groups(self._optimizer), self._rates, strict=True):
            group["lr"] = rate * now


def factor(progress: float, warm_up: float, decay: str) -> float:
    """Factor of the learning rate: linear warm-up to 1, then decay to 0 or constant."""
    if progress < warm_up:
        return progress / warm_up
    if decay == "none":
        return 1.0
    left = (1.0 - progress) / (1.0 - warm_up)
    return left if decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


class Temperature:
    """The temperature of training steps as a function of training progress.

    Applies in training mode only: validations, diagnostics and the saved policy use the configured
    temperature.

    Args:
        settings: initial_temperature, annealing_share.
        policy: in training; its configured temperature is the final one.
    """

    def __init__(self, settings: TrainingConfig, policy: TwoTowerPolicy) -> None:
        self._settings = settings
        self._policy = policy

    def at(self, progress: float) -> None:
        """Set the temperature for progress in [0, 1)."""
        begin = self._settings.initial_temperature
        if begin is not None:
            self._policy.training_temperature = temperature(
                progress,
                begin,
                self._policy.config.softmax_temperature(),
                self._settings.annealing_share,
            )

    def end(self) -> None:
        """Restore the configured temperature."""
        self._policy.training_temperature = None


def temperature(progress: float, begin: float, end: float, until: float) -> float:
    """Geometric annealing: begin^(1 - p) end^p with p = progress / until, then end."""
    if progress >= until:
        return end
    return begin * math.pow(end / begin, progress / until)


class WeightAverage:
    """Mean of a module's parameters over the last share of training.

    Each update costs one pass over the parameters.
    Source: Polyak and Juditsky 1992; Izmailov et al. 2018, "Averaging weights leads to wider optima
    and better generalization".

    Args:
        share: of training, at its end.
    """

    def __init__(self, module: nn.Module, share: float) -> None:
        self._module = module
        self._begin = 1.0 - share
        self._steps = 0
        self._mean: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] | None = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Add the current weights to the mean, if `progress` lies in the last share."""
        if progress < self._begin:
            return
        self._steps += 1
        for name, parameter in self._module.named_parameters():
            if name not in self._mean:
                self._mean[name] = parameter.detach().clone()
            else:
                self._mean[name].lerp_(parameter, 1.0 / self._steps)

    def swap_in(self) -> None:
        """Load the average into the module until `swap_out`; does nothing before there is one."""
        if self._steps:
            self._last = {k: p.detach().clone() for k, p in self._module.named_parameters()}
            self._copy(self._mean)

    def swap_out(self) -> None:
        """Restore the module's own weights."""
        if self._last is not None:
            self._copy(self._last)
            self._last = None

    def state(self) -> dict[str, Tensor]:
        content = {f"average/{name}": tensor for name, tensor in self._mean.items()}
        return {**content, "average_steps": torch.tensor(self._steps, device="cpu")}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._steps = int(state["average_steps"])
        self._mean = {
            name: state[f"average/{name}"].to(parameter.device, copy=True)
            for name, parameter in self._module.named_parameters()
            if f"average/{name}" in state
        }

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._module.named_parameters():
            parameter.copy_(weights[name])


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    if isinstance(optimizer, JointOptimizer):
        return [*optimizer.dense.param_groups, *optimizer.tables.param_groups]
    return list(optimizer.param_groups)

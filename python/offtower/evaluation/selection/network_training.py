"""The training loop of the importance-fitting network: closed-form gradient, no allocation.

A step on the whole log is three products of (n A, hidden) x (hidden, hidden), and at n A of 20,000
most of a step written with autograd goes into fetching fresh memory for their results. Here every
large array is made once. The loss and its gradient by the logits are float64 whatever the
precision of the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FitProblem:
    """What a network is fitted on.

    behavior: (n, A). weight: (n,) target / behavior of the logged items. logged: (n,) their
    numbers. context: (n, d). item: (A, e), or (n, A, e) inputs of each pair.
    """

    behavior: Tensor
    weight: Tensor
    logged: Tensor
    context: Tensor
    item: Tensor


class SplitNet(nn.Module):
    """sigmoid(MLP([context, item features])), its first layer shared over items and contexts."""

    def __init__(self, dim_context: int, dim_item: int, hidden: int) -> None:
        super().__init__()
        options: Any = {"dtype": torch.float32, "device": "cpu"}
        self.first_context = nn.Linear(dim_context, hidden, **options)
        self.first_item = nn.Linear(dim_item, hidden, bias=False, **options)
        self.second = nn.Linear(hidden, hidden, **options)
        self.last = nn.Linear(hidden, 1, **options)

    def forward(self, context: Tensor, item: Tensor) -> Tensor:
        """(n, A) logits of rho."""
        mixed = self.first_context(context)[:, None, :] + self.first_item(item)
        hidden = torch.relu(self.second(torch.relu(mixed)))
        return self.last(hidden).squeeze(-1)


def importance_loss(
    logit: Tensor, problem: FitProblem, penalty: float, share: float
) -> tuple[float, Tensor]:
    """mean (w~ - w)^2 + penalty mean (p - k)^2 and its gradient by the logits, both float64.

    With p = sum_a pi_b rho and w~ = exp(logit) (1 - p) / p at the logged item (rho / (1 - rho) is
    exp(logit): nothing is subtracted from one).
    """
    n = logit.shape[0]
    logit = logit.double()
    rho = torch.sigmoid(logit)
    p = (problem.behavior * rho).sum(dim=1)
    rows = torch.arange(n, device=logit.device)
    pseudo = torch.exp(logit[rows, problem.logged]) * (1.0 - p) / p
    off, drift = pseudo - problem.weight, p - share
    loss = float((off @ off + penalty * (drift @ drift)) / n)
    by_pseudo = 2.0 / n * off
    by_p = 2.0 / n * penalty * drift - by_pseudo * pseudo / (p * (1.0 - p))
    gradient = by_p[:, None] * problem.behavior * rho * (1.0 - rho)
    gradient[rows, problem.logged] += by_pseudo * pseudo
    return loss, gradient


class Trainer:
    """Steps of Adam on the whole log.

    dtype: of the large products, float32 or bfloat16; parameters stay float32.
    """

    def __init__(
        self, net: SplitNet, problem: FitProblem, rate: float, dtype: torch.dtype = torch.float32
    ) -> None:
        self.net, self.problem, self.dtype = net, problem, dtype
        self.optimiser = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
        n, n_items = problem.behavior.shape
        hidden = net.second.weight.shape[0]
        shape = (n * n_items, hidden)
        self.first, self.second, self.back = (
            torch.empty(shape, dtype=dtype, device="cpu") for _ in range(3)
        )
        self.shape = (n, n_items, hidden)
        self.context = problem.context.to(dtype)
        self.item = problem.item.to(dtype)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, penalty: float, share: float) -> float:
        """One step; returns the loss before it."""
        logit = self._forward()
        loss, gradient = importance_loss(logit, self.problem, penalty, share)
        self._backward(gradient.float())
        self.optimiser.step()
        return loss

    def _forward(self) -> Tensor:
        net, dtype = self.net, self.dtype
        of_context = self.context @ net.first_context.weight.to(dtype).T
        of_context += net.first_context.bias.to(dtype)
        of_item = self.item @ net.first_item.weight.to(dtype).T
        torch.add(of_context[:, None, :], of_item, out=self.first.view(self.shape)).relu_()
        bias = net.second.bias.to(dtype)
        torch.addmm(bias, self.first, net.second.weight.to(dtype).T, out=self.second).relu_()
        logit = self.second @ net.last.weight[0].to(dtype)
        return logit.view(self.shape[:2]).float() + net.last.bias

    def _backward(self, gradient: Tensor) -> None:
        net, dtype = self.net, self.dtype
        n, n_items, _ = self.shape
        flat = gradient.reshape(-1, 1).to(dtype)
        _set(net.last.weight, (flat.T @ self.second))
        _set(net.last.bias, gradient.sum().reshape(1))
        torch.mul(flat, net.last.weight.to(dtype), out=self.back)
        _mask(self.back, self.second)
        _set(net.second.weight, self.back.T @ self.first)
        _set(net.second.bias, self.back.sum(dim=0, dtype=torch.float32))
        # The second layer's output is not needed any more: its memory takes the gradient.
        torch.mm(self.back, net.second.weight.to(dtype), out=self.second)
        _mask(self.second, self.first)
        cube = self.second.view(self.shape)
        by_context = cube.sum(dim=1, dtype=torch.float32)
        _set(net.first_context.weight, by_context.T @ self.problem.context)
        _set(net.first_context.bias, by_context.sum(dim=0))
        if self.item.dim() == 2:
            by_item = cube.sum(dim=0, dtype=torch.float32)
            _set(net.first_item.weight, by_item.T @ self.problem.item)
        else:
            _set(net.first_item.weight, self.second.T @ self.item.reshape(n * n_items, -1))

    @torch.no_grad()
    def rho(self) -> Tensor:
        """(n, A) float64, strictly between 0 and 1."""
        tiny = 1e-9
        logit = self.net(self.problem.context, self.problem.item)
        return torch.sigmoid(logit.double()).clamp(tiny, 1.0 - tiny)


def _set(parameter: Tensor, gradient: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.copy_(gradient.view_as(parameter))


def _mask(gradient: Tensor, output: Tensor) -> None:
    """In place: zero where the ReLU's output is."""
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0.0, grad_input=gradient)

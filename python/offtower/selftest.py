"""`offtower doctor --selftest`: operators, resumption and damage detection on this machine.

It is the first thing to run when something looks wrong, and takes about ten seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offtower.config import Config, load_config, parse_config, to_yaml
from offtower.errors import OfftowerError
from offtower.ops import (
    FactoredReward,
    available_backends,
    available_instruction_sets,
    policy_terms,
    top_k,
)
from offtower.tracking import Tracker

KILL_AT_STEP = 12
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error, relative to the largest magnitude of the tensor. bfloat16 has 8 significant bits,
and gradients are rounded to it."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    detail: str
    seconds: float


def run_selftest(folder: Path) -> Iterator[Check]:
    """Run every check and yield its result; `folder` is a scratch directory."""
    # Training comes first: a child process is started before this one has many threads.
    yield timed_check("kill and resume", lambda: check_kill_and_resume(folder))
    yield timed_check("damage is refused", lambda: check_damage_is_refused(folder))
    for label, backend, isa, device in _targets():
        for dtype in _TOLERANCE:
            name = f"operators: {label}, {str(dtype).removeprefix('torch.')}"
            with _instruction_set(isa):
                yield timed_check(name, partial(check_operators, backend, dtype, device))


def timed_check(name: str, check: Callable[[], str]) -> Check:
    began = time.perf_counter()
    try:
        detail, passed = check(), True
    except Exception as error:
        detail, passed = f"{type(error).__name__}: {error}", False
    return Check(name, passed, detail, time.perf_counter() - began)


def _targets() -> Iterator[tuple[str, str, str, str]]:
    """(label, backend, instruction set, device) of everything that this machine can run."""
    for isa in available_instruction_sets():
        yield f"cpu {isa}", "cpu", isa, "cpu"
    if "cuda" in available_backends() and torch.cuda.is_available():
        yield "cuda", "cuda", "", "cuda"
    yield "reference", "reference", "", "cpu"


@contextmanager
def _instruction_set(isa: str) -> Iterator[None]:
    before = os.environ.get("OFFTOWER_CPU_ISA")
    if isa:
        os.environ["OFFTOWER_CPU_ISA"] = isa
    try:
        yield
    finally:
        os.environ.pop("OFFTOWER_CPU_ISA", None)
        if before is not None:
            os.environ["OFFTOWER_CPU_ISA"] = before


def check_operators(backend: str, dtype: torch.dtype, device: str) -> str:
    """Values and gradients of `policy_terms`, and `top_k`, against dense float64 formulas."""
    worst = 0.0
    for rows, items, dim in ((1, 1, 1), (33, 1501, 48), (130, 700, 64)):
        generator = torch.Generator().manual_seed(rows)

        def draw(*shape: int, of: torch.Generator = generator) -> Tensor:
            drawn = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=of)
            return drawn.to(device, dtype)

        u, v, bias = draw(rows, dim), draw(items, dim) / dim**0.5, draw(items)
        context, item = draw(rows, 8), draw(items, 8)
        action = torch.randint(0, items, (rows,), generator=generator, device="cpu").to(device)
        leaves = [tensor.clone().requires_grad_() for tensor in (u, v, bias)]
        terms = policy_terms(
            leaves[0],
            leaves[1],
            action,
            item_bias=leaves[2],
            reward_model=FactoredReward(context, item, link="sigmoid"),
            entropy=True,
            backend=backend,  # type: ignore[arg-type]
        )
        assert terms.expected_reward is not None and terms.entropy is not None
        got = [terms.log_prob, terms.expected_reward, terms.entropy]
        torch.stack([term.sum() for term in got]).sum().backward()

        exact = [tensor.double().requires_grad_() for tensor in (u, v, bias)]
        logits = exact[0] @ exact[1].T + exact[2]
        log_pi = torch.log_softmax(logits, dim=1)
        reward = torch.sigmoid(context.double() @ item.double().T)
        wanted = [
            log_pi.gather(1, action[:, None])[:, 0],
            (log_pi.exp() * reward).sum(dim=1),
            -(log_pi.exp() * log_pi).sum(dim=1),
        ]
        torch.stack([term.sum() for term in wanted]).sum().backward()
        pairs = [*zip(got, wanted, strict=True)]
        pairs += [(x.grad, y.grad) for x, y in zip(leaves, exact, strict=True)]  # type: ignore[misc]
        for ours, truth in pairs:
            scale = float(truth.detach().abs().max().clamp_min(1.0))
            error = (ours.detach().double() - truth.detach()).abs().max()
            worst = max(worst, float(error) / scale)

        k = min(5, items)
        scores, _ = top_k(u, v, k, item_bias=bias, backend=backend)  # type: ignore[arg-type]
        best = logits.detach().topk(k, dim=1).values
        worst = max(worst, float((scores.double() - best).abs().max() / best.abs().max()))
    if not worst <= _TOLERANCE[dtype]:
        raise OfftowerError(
            f"the largest relative error against float64 is {worst:.1e}, above {_TOLERANCE[dtype]}"
        )
    return f"largest relative error {worst:.1e}"


def check_kill_and_resume(folder: Path) -> str:
    """A run killed by SIGKILL and resumed has the weights of one that was not interrupted."""
    from offtower.training.run import train_run

    _write_log(folder)
    killed, whole = _config(folder, "killed"), _config(folder, "whole")
    path = folder / "killed.yaml"
    path.write_text(to_yaml(killed), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "offtower.selftest", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != -signal.SIGKILL:
        raise OfftowerError(f"the child ended by itself ({done.returncode}): {done.stderr[-500:]}")
    train_run(killed, resume=True)
    train_run(whole)
    one, two = _weights(killed), _weights(whole)
    if one != two:
        raise OfftowerError("the resumed policy differs from the uninterrupted one")
    return f"killed at step {KILL_AT_STEP}, resumed to the same bits"


def check_damage_is_refused(folder: Path) -> str:
    """A policy with one flipped bit is refused when it is loaded."""
    from offtower.models.store import load_policy

    config = _config(folder, "whole")
    path = config.run_directory / "policy" / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    try:
        load_policy(config.run_directory / "policy")
    except OfftowerError as error:
        if path.name not in str(error):
            raise OfftowerError(f"the refusal does not name the file: {error}") from error
        return "one flipped bit in a policy was refused"
    raise OfftowerError("a policy with a flipped bit was loaded without an error")


def _write_log(folder: Path) -> None:
    from offtower.data import write_catalogue, write_log
    from offtower.data.simulate import SimulatedWorld, WorldSettings

    world = SimulatedWorld(12, WorldSettings(4, 4, 4, intercept=0.0), seed=1)
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    write_log(folder / "train", world.log(400, seed=0), world.log_schema, rows_per_group=100)


def _config(folder: Path, name: str) -> Config:
    content: dict[str, Any] = {
        "name": name,
        "runs": str(folder / "runs"),
        "data": {"train": str(folder / "train"), "catalogue": str(folder / "catalogue")},
        "policy": {"embedding_dim": 4},
        "objective": {"name": "ips"},
        "training": {
            "epochs": 2,
            "batch_size": 40,
            "log_every_steps": 1,
            "checkpoint_every_seconds": 0.0,
            "threads": 1,
        },
    }
    return parse_config(content, source="selftest")


def _weights(config: Config) -> bytes:
    return (config.run_directory / "policy" / "policy.safetensors").read_bytes()


class _Kill(Tracker):
    """Kill this process when training logs a given step."""

    def write(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["step"] >= KILL_AT_STEP:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_until_killed(path: str) -> None:
    """Entry point of the child process."""
    from offtower.run_claim import claim_run
    from offtower.training.run import train_claimed

    config = load_config(path)
    with claim_run(config) as run:
        train_claimed(run, config, trackers=[_Kill()])


if __name__ == "__main__":
    _train_until_killed(sys.argv[1])

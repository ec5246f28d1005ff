"""When in the backward pass each gradient is complete: what overlapping its exchange could hide.

    python benchmarks/experiments/gradient_readiness.py --items 100000

One process, one thread, exact terms, times of the processor. A bucket of gradients can be sent from
the time at which it is complete; what is left of the backward pass is the most that can be hidden.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from offtower.benchmarks import world
from offtower.prepare import prepare
from offtower.progress import Progress
from offtower.training.run import build_trainer
from offtower.training.step import StepKey


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = world.config("exact", batch=given.batch, dim=given.dim, epochs=1)
    log, catalogue = world.in_memory(given.batch * given.steps, given.items)
    trainer = build_trainer(config, prepare(log, None, catalogue, Progress()), None)
    ready: dict[str, float] = {}
    for name, parameter in trainer.policy.named_parameters():

        def note(_: torch.Tensor, name: str = name) -> None:
            ready[name] = time.process_time()

        parameter.register_post_accumulate_grad_hook(note)
    left: dict[str, list[float]] = {}
    backward: list[float] = []
    with trainer.reader() as reader:
        for number, batch in enumerate(reader.epoch(0)):
            result, _ = trainer.step.loss(batch, key=StepKey(number, number))
            trainer.policy.zero_grad(set_to_none=True)
            began = time.process_time()
            result.loss.backward()
            ended = time.process_time()
            if not number:
                continue  # The first step warms up.
            backward.append(ended - began)
            for name, when in ready.items():
                left.setdefault(name, []).append((ended - when) / (ended - began))
    print(f"{given.items:,} items: backward {1e3 * statistics.median(backward):.1f} ms")
    for name, parameter in trainer.policy.named_parameters():
        if name in left:
            share = statistics.median(left[name])
            print(f"{name:<40} {parameter.numel():>9,} numbers, {share:7.2%} of the backward left")


if __name__ == "__main__":
    main()

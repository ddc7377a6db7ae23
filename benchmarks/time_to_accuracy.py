"""Seconds to an accuracy, against the loop that one would write by hand.

    python benchmarks/time_to_accuracy.py CURVE [CONFIG] [--targets 0.95 0.975] [--blocks 4] [--steps 40]

CURVE is the ``metrics.jsonl`` of a run of CONFIG, whose validations say after how many outer steps each target was
reached; CONFIG (omniglot-5way-1shot-maml) is a second-order MAML on conv4, with Adam on a cosine schedule. Both sides
then really train with it from its initialisation on its tasks, a block of steps in turns: distmeta with a worker of one
thread for each core, and autograd over torch's own layers, task by task, in one process with all cores. Printed are the
accuracy on training tasks in each block, which shows that both follow the same curve, and the median of seconds a step,
by which the steps become times. Starting up is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from speed import TorchConv4
from torch.func import functional_call

import distmeta
from distmeta.config import load
from distmeta.distributed.work import Shard
from distmeta.experiment import assemble


def by_hand(name: str) -> Iterator[tuple[float, float]]:
    """Seconds and query accuracy of one outer step after the other."""
    experiment = assemble(load(name, ["scaling.num_workers=0"]))
    config, problem, algorithm = experiment.config, experiment.problem, experiment.problem.algorithm
    assert isinstance(algorithm, distmeta.MAML)
    assert config.train.meta_batch_size
    pooled = config.model.options.get("downsample") == "pool"
    network = TorchConv4(problem.loss.module, pooled)  # pyright: ignore[reportArgumentType]
    theta: dict[str, torch.Tensor] = dict(network.named_parameters())
    optimizer = torch.optim.Adam(network.parameters(), lr=config.outer.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.train.steps)
    step, size = 0, config.train.meta_batch_size
    while True:
        start, right = time.perf_counter(), 0.0
        optimizer.zero_grad()
        episodes: Any = problem.build(Shard("train", step, 0, size))
        for (xs, ys), (xq, yq) in episodes:
            adapted = theta
            for _ in range(algorithm.inner_steps):
                value = F.cross_entropy(functional_call(network, adapted, (xs,)), ys)
                gradient = torch.autograd.grad(value, list(adapted.values()), create_graph=True)
                adapted = {n: p - algorithm.inner_lr * g for (n, p), g in zip(adapted.items(), gradient, strict=True)}
            logits = functional_call(network, adapted, (xq,))
            (F.cross_entropy(logits, yq) / size).backward()
            right += float((logits.argmax(1) == yq).float().mean()) / size
        optimizer.step()
        schedule.step()
        step += 1
        yield time.perf_counter() - start, right


def main(arguments: argparse.Namespace) -> None:
    records = [json.loads(line) for line in arguments.curve.read_text().splitlines()]
    validations = [record for record in records if record["kind"] == "val"]
    loop, cores = by_hand(arguments.config), os.cpu_count() or 1
    steps = load(arguments.config).train.steps
    ours, theirs = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        for block in range(1, arguments.blocks + 1):
            done, until = block * arguments.steps, f"train.steps={block * arguments.steps}"
            if block == 1:
                settings = [f"scaling.num_workers={cores}", "validation.every=0", "evaluation.tasks=0"]
                settings += ["train.log_every=10", f"outer.schedule={{use: CosineAnnealingLR, T_max: {steps}}}"]
                run = distmeta.train(arguments.config, *settings, until, f"run_dir={folder}/run")
            else:
                run = distmeta.resume(f"{folder}/run", until)
            lines = [r for r in run.records() if r["kind"] == "train"][-arguments.steps // 10 :]
            ours += [
                sum(r["seconds"][part] for part in ("map", "reduce", "outer", "checkpoint")) / r["steps"] for r in lines
            ]
            seconds, right = zip(*(next(loop) for _ in range(arguments.steps)), strict=True)
            theirs += seconds
            reached = statistics.mean(r["accuracy"] for r in lines)
            hand = statistics.mean(right)
            print(f"to step {done}: training accuracy of the block by hand {hand:.1%}, distmeta {reached:.1%}")
    hand, mine = statistics.median(theirs), statistics.median(ours)
    print(f"{cores} cores: {1000 * hand:.0f} ms a step by hand, {1000 * mine:.0f} ms distmeta: {hand / mine:.2f} times")
    for target in arguments.targets:
        done = next((v["step"] for v in validations if v["after"]["mean"] >= target), None)
        if done is None:
            print(f"{target:.1%}: never reached in {arguments.curve}")
        else:
            print(f"{target:.1%} after {done:,} steps: {done * hand:,.0f} s by hand, {done * mine:,.0f} s distmeta")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", type=Path)
    parser.add_argument("config", nargs="?", default="omniglot-5way-1shot-maml")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.95, 0.975])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="outer steps of a block, a multiple of 10")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())

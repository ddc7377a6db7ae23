"""The sinusoid: a meta-trained initialisation against one trained jointly on all tasks, adapted the same way.

    python benchmarks/sinusoid_joint.py RUN

RUN is a run of ``sinusoid-maml``. The joint model is the same network, trained for the same number of steps on the same
tasks' support and query points by Adam of the same rate, then fine-tuned at test with the best of several rates (Finn
et al., 2017, section 5.1, "pretrained").
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from distmeta import MAML, RunFolder
from distmeta.distributed.executor import InProcess
from distmeta.distributed.work import Problem, shards_of
from distmeta.evaluation import evaluate_tasks
from distmeta.experiment import Experiment, assemble

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def joint_initialisation(experiment: Experiment, steps: int) -> Problem:
    """Trains the experiment's network on the pooled points of the meta-training tasks, in place."""
    config, problem = experiment.config, experiment.problem
    optimizer = torch.optim.Adam(problem.loss.module.parameters(), lr=config.outer.lr)
    for step in range(steps):
        tasks = problem.build(shards_of("train", step, config.train.meta_batch_size, config.train.meta_batch_size)[0])
        x, y = (torch.cat([batch[i] for task in tasks for batch in task]) for i in (0, 1))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(problem.loss.module(x), y).backward()
        optimizer.step()
    return problem


def joint_errors(problem: Problem, tasks: int, steps: int) -> dict[float, list[float]]:
    """For each inner rate, the mean test error before and after each inner step from the joint model."""
    vector = problem.layout.pack({f"model.{name}": p.detach() for name, p in problem.loss.module.named_parameters()})
    errors: dict[float, list[float]] = {}
    for rate in RATES:
        tuned = dataclasses.replace(problem, algorithm=MAML(inner_lr=rate, inner_steps=steps))
        result = evaluate_tasks(InProcess(tuned), tuned, vector, "test", tasks, 50)
        errors[rate] = [value["mean"] for value in result["by_inner_step"]["loss"]]
    return errors


def main(path: str) -> None:
    run = RunFolder.open(path)
    config = run.config()
    test = run.summary()["test"]["by_inner_step"]["loss"]
    problem = joint_initialisation(assemble(config), config.train.steps)
    errors = joint_errors(problem, config.evaluation.tasks, len(test) - 1)
    print("inner steps                      " + "".join(f"{k:>8}" for k in (0, 1, 5, 10)))
    print("meta-trained                     " + "".join(f"{test[k]['mean']:8.3f}" for k in (0, 1, 5, 10)))
    for rate, values in errors.items():
        print(f"jointly trained, inner rate {rate:<5}" + "".join(f"{values[k]:8.3f}" for k in (0, 1, 5, 10)))


if __name__ == "__main__":
    main(sys.argv[1])

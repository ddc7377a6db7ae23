"""Images: a meta-trained network against one that was trained to classify all training classes, and is then fine-tuned.

    python benchmarks/finetuning.py RUN [--images 1000000] [--tasks 600]

RUN is a run on few-shot classification of images. The same network, with an output for each class of meta-training,
is trained on their images by Adam at the run's rate, in batches of as many images as a task has, for as many images as
the run has seen or --images (Chen et al., ICLR 2019, "Baseline"). Its head is then replaced by a new one for each task,
and fine-tuned by as many steps as the run takes at test: the head alone, or the whole network, each with that of RATES
which is best on validation tasks. Printed beside them is the nearest prototype of its features (Snell et al., 2017).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import torch

from distmeta import MAML, MetaAlgorithm, ProtoMAML, RunFolder
from distmeta.core.seeds import stream
from distmeta.distributed.executor import InProcess
from distmeta.distributed.work import Problem, reproducible
from distmeta.evaluation import Evaluation, evaluate_tasks, show
from distmeta.experiment import Experiment, assemble
from distmeta.tasks.images import FewShotImages

RATES = (0.01, 0.1, 1.0)
VALIDATION = 100  # tasks


def supervised(experiment: Experiment, tasks: FewShotImages, images: int) -> torch.nn.Module:
    """The experiment's network with an output for each training class, trained on so many images."""
    config, problem = experiment.config, experiment.problem
    groups, whole = tasks.members["train"], tasks.dataset
    rows = np.concatenate([whole.starts[g] + np.arange(whole.counts[g]) for g in groups])
    labels = np.repeat(np.arange(len(groups)), whole.counts[groups])
    module = problem.loss.module
    old = module.get_submodule("classifier")
    module.set_submodule("classifier", torch.nn.Linear(old.in_features, len(groups)))  # pyright: ignore
    optimizer = torch.optim.Adam(module.parameters(), lr=config.outer.lr)
    episode = tasks.sample(stream(0), "train")
    size = sum(len(y) for _, y in episode)
    start, right = time.perf_counter(), 0.0
    steps = images // size
    with reproducible(1, 0):
        for step in range(steps):
            chosen = stream("finetuning", step).integers(len(rows), size=size)
            x, y = tasks.inputs(whole.examples[rows[chosen]]), torch.from_numpy(labels[chosen])
            logits = module(x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, y).backward()
            optimizer.step()
            right = 0.99 * right + 0.01 * float((logits.argmax(-1) == y).double().mean())
            if step % 500 == 499:
                print(f"  step {step + 1}: accuracy {right:.3f} on {len(groups)} classes", flush=True)
    print(f"trained on {steps * size:,} images in {time.perf_counter() - start:.0f} s")
    module.set_submodule("classifier", old)
    return module


def judged(problem: Problem, algorithm: MetaAlgorithm, split: Any, tasks: int) -> Evaluation:
    """How ``algorithm`` adapts the network that the problem holds."""
    tuned = dataclasses.replace(problem, algorithm=algorithm)
    vector = tuned.layout.pack({f"model.{name}": p.detach() for name, p in tuned.loss.module.named_parameters()})
    return evaluate_tasks(InProcess(tuned), tuned, vector, split, tasks, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, help="none: as many as the run has seen")
    parser.add_argument("--tasks", type=int, default=600)
    given = parser.parse_args()
    config = RunFolder.open(given.run).config()
    experiment = assemble(config)
    problem = experiment.problem
    assert isinstance(problem.tasks, FewShotImages)
    seen = sum(len(y) for _, y in problem.tasks.sample(stream(0), "train"))
    images = given.images or seen * config.train.meta_batch_size * config.train.steps
    supervised(experiment, problem.tasks, images)
    steps = getattr(config.algorithm, "test_inner_steps", None) or 10
    for name, patterns in (("head", ("classifier.*",)), ("whole network", ("*",))):
        found = {
            rate: judged(problem, MAML(inner_lr=rate, inner_steps=steps, adapted_params=patterns), "val", VALIDATION)
            for rate in RATES
        }
        best = max(found, key=lambda rate: found[rate]["after"]["mean"])
        test = judged(problem, MAML(inner_lr=best, inner_steps=steps, adapted_params=patterns), "test", given.tasks)
        print(f"{name}, {steps} steps at rate {best}: {show('accuracy', test['after'])}", end="")
        print(f", {show('accuracy', test['inductive'])} (inductive)" if "inductive" in test else "", flush=True)
    test = judged(problem, ProtoMAML(inner_steps=0), "test", given.tasks)
    print(f"nearest prototypes: {show('accuracy', test['after'])}")


if __name__ == "__main__":
    main()

"""Tasks a second in meta-training, against the ways in which PyTorch's users do it.

    python benchmarks/speed.py [WORKLOAD ...] [--rounds 7] [--tasks 32] [--threads 1] [--sides loop higher ...]

Sides, each in a process of its own, which take turns with one meta-batch each:

- loop: autograd over torch's own layers, task by task, as learn2learn's MAML does it; all cores in one process;
- higher: the same network through ``higher.innerloop_ctx``; all cores;
- torchopt: the same through ``torchopt.MetaSGD``; all cores;
- jax: ``jit`` over ``vmap`` over ``grad`` of all tasks of a meta-batch, for perceptrons alone. Its threads are set by
  ``XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"``;
- ours-1: distmeta in one process, one thread;
- ours: distmeta with a worker of one thread for each core.

``--device cuda`` puts all sides on a GPU, where ours has one worker; give it ``--strategy compiled --shard-size 32``.

With ``--threads 1`` loop, higher and torchopt have one thread as well: processor time, which hardly depends on what
else the machine does, is what to compare then.

Before anything is timed, the mean meta-gradients of the first meta-batch are compared (they agree to 5%: single
precision through two derivatives; the tests compare in double). Printed are the median of tasks a second, the ratio to
the first side in the same round (median, least and greatest), the processor time of a task, and the memory that the
side's process took at its peak, with ``--device cuda`` that of the GPU (for ``ours`` these two are of the driver
alone). A side whose library is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distmeta import MAML, Episode
from distmeta.config import Scaling
from distmeta.core.loss import ModuleLoss, cross_entropy, mse
from distmeta.core.params import Layout, join
from distmeta.distributed.executor import InProcess, reduce_mean
from distmeta.distributed.work import Problem, Shard, shards_of, to_device
from distmeta.models import MLP, Conv4


class Workload(NamedTuple):
    shape: tuple[int, ...]
    ways: int
    """0: a regression."""
    shots: int
    queries: int
    """Of each class."""
    model: dict[str, Any]
    inner_lr: float
    inner_steps: int = 1
    first_order: bool = False
    shard_size: int = 4
    strategy: str = "loop"


POOLED, STRIDED = {"downsample": "pool", "head": "flatten"}, {"downsample": "stride"}
PHOTOS = {"downsample": "pool", "head": "flatten", "filters": 32}
WORKLOADS = {
    "pooled": Workload((1, 28, 28), 5, 1, 15, POOLED, 0.4),
    "pooled-first-order": Workload((1, 28, 28), 5, 1, 15, POOLED, 0.4, first_order=True),
    "strided": Workload((1, 28, 28), 5, 1, 15, STRIDED, 0.4),
    "strided-first-order": Workload((1, 28, 28), 5, 1, 15, STRIDED, 0.4, first_order=True),
    "strided-5-steps": Workload((1, 28, 28), 5, 1, 15, STRIDED, 0.1, inner_steps=5),
    "strided-20-ways": Workload((1, 28, 28), 20, 1, 15, STRIDED, 0.1),
    "photographs": Workload((3, 84, 84), 5, 1, 15, PHOTOS, 0.01, inner_steps=5),
    "sinusoid": Workload((1,), 0, 10, 10, {}, 0.01, shard_size=32, strategy="vmap"),
    "sinusoid-compiled": Workload((1,), 0, 10, 10, {}, 0.01, shard_size=128, strategy="compiled"),
}


class Tasks:
    """Tasks of random numbers: what is timed does not depend on what the images show."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.inputs = np.random.default_rng(0).random((500, *workload.shape), dtype=np.float32)

    def sample(self, rng: np.random.Generator, split: str) -> Episode:  # noqa: ARG002
        w = self.workload
        sets = []
        for each in (w.shots, w.queries):
            x = torch.from_numpy(self.inputs[rng.integers(len(self.inputs), size=max(w.ways, 1) * each)])
            sets.append((x, torch.arange(w.ways).repeat_interleave(each) if w.ways else torch.sin(4 * x)))
        return Episode(*sets)


class TorchConv4(nn.Module):
    """Conv4 of torch's own layers, as one would write it."""

    def __init__(self, like: Conv4, pooled: bool) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for block in like.features:
            blocks += [block.conv, block.norm, nn.ReLU()]
            blocks += [nn.MaxPool2d(2)] if pooled else []
        self.features, self.classifier, self.mean = nn.Sequential(*blocks), like.classifier, like.mean

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.classifier(features.mean((2, 3)) if self.mean else features.flatten(1))


def make(workload: Workload, device: str) -> tuple[Problem, np.ndarray, nn.Module]:
    """Our problem, its initial parameters, and the network of torch's own layers with the same parameters."""
    torch.manual_seed(0)
    network: nn.Module
    if workload.ways:
        network = Conv4(workload.shape, workload.ways, **workload.model)
        theirs: nn.Module = TorchConv4(network, workload.model["downsample"] == "pool")
    else:
        network = theirs = MLP(workload.shape, 1)
    algorithm = MAML(workload.inner_lr, workload.inner_steps, first_order=workload.first_order)
    loss = ModuleLoss(network, cross_entropy if workload.ways else mse)
    start = join(algorithm.init(loss.init()))
    layout = Layout.of(start)
    tasks, strategy = Tasks(workload), workload.strategy
    problem = Problem(algorithm, loss, tasks, layout, seed=0, strategy=strategy, device=device)  # pyright: ignore
    return problem, layout.pack(start), theirs


def criterion(workload: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    return F.cross_entropy if workload.ways else F.mse_loss


def loop(workload: Workload, network: nn.Module, episodes: list[Episode]) -> list[Tensor]:
    loss, second = criterion(workload), not workload.first_order
    theta = dict(network.named_parameters())
    total = [torch.zeros_like(p) for p in theta.values()]
    for (xs, ys), (xq, yq) in episodes:
        adapted = theta
        for _ in range(workload.inner_steps):
            value = loss(functional_call(network, adapted, (xs,)), ys)
            gradient = torch.autograd.grad(value, list(adapted.values()), create_graph=second)
            adapted = {n: p - workload.inner_lr * g for (n, p), g in zip(adapted.items(), gradient, strict=True)}
        value = loss(functional_call(network, adapted, (xq,)), yq)
        for t, g in zip(total, torch.autograd.grad(value, list(theta.values())), strict=True):
            t += g
    return total


def by_higher(workload: Workload, network: nn.Module, episodes: list[Episode]) -> list[Tensor]:
    import higher

    loss = criterion(workload)
    optimizer = torch.optim.SGD(network.parameters(), lr=workload.inner_lr)
    network.zero_grad()
    for (xs, ys), (xq, yq) in episodes:
        with higher.innerloop_ctx(
            network, optimizer, copy_initial_weights=False, track_higher_grads=not workload.first_order
        ) as (adapted, steps):
            for _ in range(workload.inner_steps):
                steps.step(loss(adapted(xs), ys))
            value = loss(adapted(xq), yq)
            if workload.first_order:  # the adapted parameters are constants plus leaves: their gradient is theta's
                gradients = torch.autograd.grad(value, list(adapted.parameters()))
                for p, g in zip(network.parameters(), gradients, strict=True):
                    p.grad = g.clone() if p.grad is None else p.grad.add_(g)
            else:
                value.backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in network.parameters()]


def by_torchopt(workload: Workload, network: nn.Module, episodes: list[Episode]) -> list[Tensor]:
    import torchopt

    loss = criterion(workload)
    theta = list(network.parameters())
    total = [torch.zeros_like(p) for p in theta]
    optimizer = torchopt.MetaSGD(network, lr=workload.inner_lr)
    before, state = (torchopt.extract_state_dict(thing, by="reference") for thing in (network, optimizer))
    for (xs, ys), (xq, yq) in episodes:
        for _ in range(workload.inner_steps):
            optimizer.step(loss(network(xs), ys))
        for t, g in zip(total, torch.autograd.grad(loss(network(xq), yq), theta), strict=True):
            t += g
        torchopt.recover_state_dict(network, before)
        torchopt.recover_state_dict(optimizer, state)
    return total


@cache
def jitted(inner_lr: float, inner_steps: int) -> Callable[..., list[Any]]:
    import jax
    import jax.numpy as jnp

    def loss(theta: list[Any], x: Any, y: Any) -> Any:
        for i in range(0, len(theta), 2):
            x = (jnp.maximum(x, 0) if i else x) @ theta[i].T + theta[i + 1]
        return ((x - y) ** 2).mean()

    def outer(theta: list[Any], xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
        adapted = theta
        for _ in range(inner_steps):
            gradient = jax.grad(loss)(adapted, xs, ys)
            adapted = [p - inner_lr * g for p, g in zip(adapted, gradient, strict=True)]
        return loss(adapted, xq, yq)

    @jax.jit
    def total(theta: list[Any], *batches: Any) -> list[Any]:
        return [g.sum(0) for g in jax.vmap(jax.grad(outer), (None, 0, 0, 0, 0))(theta, *batches)]

    return total


def by_jax(workload: Workload, network: nn.Module, episodes: list[Episode]) -> list[Tensor]:
    theta = [p.detach().numpy() for p in network.parameters()]
    batches = [np.stack([batch.numpy() for batch in batches]) for batches in zip(*map(flat, episodes), strict=True)]
    return [torch.from_numpy(np.array(g)) for g in jitted(workload.inner_lr, workload.inner_steps)(theta, *batches)]


def flat(episode: Episode) -> list[Tensor]:
    return [*episode.support_set, *episode.query_set]


THEIRS = {"loop": loop, "higher": by_higher, "torchopt": by_torchopt, "jax": by_jax}


@contextmanager
def ours(workload: Workload, workers: int, tasks: int, device: str) -> Iterator[Callable[[int], np.ndarray]]:
    """From the number of an outer step to its mean meta-gradient."""
    problem, vector, _ = make(workload, device)

    def shards(step: int) -> list[Shard]:
        return shards_of("train", step, tasks, workload.shard_size)

    if workers == 0:
        executor: Any = InProcess(problem)
    else:
        from ray import cloudpickle

        from distmeta.distributed.ray import RayPool

        cloudpickle.register_pickle_by_value(sys.modules[Tasks.__module__])  # workers do not know this script
        executor = RayPool(problem, Scaling(num_workers=workers, use_gpu=device == "cuda"), len(shards(0)))
    with executor as at_work:
        yield lambda step: reduce_mean(at_work.map("meta_gradient", vector, shards(step), shards(step + 1)))


def child(pipe: Any, side: str, workload: Workload, tasks: int, threads: int | None, device: str) -> None:
    """One side: answers step numbers with (seconds, processor seconds, mean meta-gradient), None with its peak MiB."""
    torch.backends.cudnn.allow_tf32 = False  # all sides in single precision
    if threads is not None:
        torch.set_num_threads(threads)

    def serve(run: Callable[[int], np.ndarray]) -> None:
        while (step := pipe.recv()) is not None:
            start, processor = time.perf_counter(), time.process_time()
            gradient = run(step)
            pipe.send((time.perf_counter() - start, time.process_time() - processor, gradient))
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else host / 1024)

    if side.startswith("ours"):
        many = os.cpu_count() or 1 if device == "cpu" else torch.cuda.device_count()
        with ours(workload, 0 if side == "ours-1" else many, tasks, device) as run:
            return serve(run)
    problem, _, network = make(workload, device)
    order = dict(zip(problem.loss.init(), problem.loss.module.parameters(), strict=True))
    place = {id(p): i for i, p in enumerate(network.parameters())}  # taken apart, layers list parameters in turn

    network.to(device)

    def run(step: int) -> np.ndarray:
        episodes: Any = [to_device(task, device) for task in problem.build(Shard("train", step, 0, tasks))]
        gradient = THEIRS[side](workload, network, episodes)
        parts = [gradient[place[id(p)]].detach().reshape(-1) for p in order.values()]
        return torch.cat(parts).cpu().numpy() / tasks

    serve(run)


def measure(
    name: str, workload: Workload, sides: list[str], rounds: int, tasks: int, threads: int | None, device: str
) -> None:
    if workload.ways or device != "cpu":
        sides = [side for side in sides if side != "jax"]
    if workload.first_order:  # which torchopt's differentiable optimizers do not offer
        sides = [side for side in sides if side != "torchopt"]
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for side in sides:
        pipes[side], other = context.Pipe()
        context.Process(
            target=child, args=(other, side, workload, tasks, threads, device), daemon=side != "ours"
        ).start()

    def turn(side: str, step: int) -> tuple[float, float, np.ndarray]:
        pipes[side].send(step)
        return pipes[side].recv()

    first = {side: turn(side, 0)[2] for side in sides}
    reference = first[sides[0]]
    for side, gradient in first.items():
        error = float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))
        assert error < 5e-2, f"{name}: the meta-gradient of {side} differs by {error:.1e}"
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    for step in range(1, rounds + 1):
        for side in sides:
            wall, own, _ = turn(side, step)
            seconds[side].append(wall)
            processor[side].append(own)
    for side in sides:
        pipes[side].send(None)
        ratios = sorted(a / b for a, b in zip(seconds[sides[0]], seconds[side], strict=True))
        rate = tasks / statistics.median(seconds[side])
        spread = f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        own = 1000 * statistics.median(processor[side]) / tasks
        print(f"| {name} | {side} | {rate:,.1f} | {spread} | {own:.3g} | {pipes[side].recv():,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workloads", nargs="*", default=["pooled", "strided"], metavar="WORKLOAD", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=int, default=32, help="tasks of a meta-batch")
    parser.add_argument("--threads", type=int, help="threads of the sides that are not ours; default: all cores")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--strategy", choices=("loop", "vmap", "compiled"), help="of ours; default: the workload's")
    parser.add_argument("--shard-size", type=int, help="tasks of ours that are vectorised; default: the workload's")
    parser.add_argument("--sides", nargs="+", default=[*THEIRS, "ours-1", "ours"])
    arguments = parser.parse_args()
    for name in arguments.workloads:
        if name not in WORKLOADS:
            parser.error(f"there is no workload {name!r}; there are {', '.join(WORKLOADS)}")
    installed = [
        side for side in arguments.sides if side not in ("higher", "torchopt", "jax") or importlib.util.find_spec(side)
    ]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    if arguments.device == "cuda":
        print(torch.cuda.get_device_name())
    print(
        "| workload | side | tasks/s | ratio to the first side | processor ms a task | MiB at most |\n"
        + "|---" * 6
        + "|"
    )
    own = {key: getattr(arguments, key) for key in ("strategy", "shard_size") if getattr(arguments, key)}
    for name in arguments.workloads:
        workload = WORKLOADS[name]._replace(**own)
        measure(name, workload, installed, arguments.rounds, arguments.tasks, arguments.threads, arguments.device)


if __name__ == "__main__":
    main()

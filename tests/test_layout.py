"""The first law: the same bits for any number of workers, with workers lost on the way, and after a resumption."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from problems import Blobs, our_processes, problem_of

import distmeta
from distmeta import MAML, RunFolder
from distmeta.algorithms import ALGORITHMS
from distmeta.config import Scaling
from distmeta.distributed.executor import InProcess, reduce_mean
from distmeta.distributed.ray import RayPool
from distmeta.distributed.work import shards_of
from distmeta.errors import NumericalError, ResourceError, WorkerError
from distmeta.models import MLP

CASES = {  # the packaged configurations made small: less of everything, nothing left out
    "glyphs-5way-1shot-maml": ["model.filters=8", "tasks.train_queries=2", "train.meta_batch_size=6"],
    "glyphs-5way-1shot-reptile": ["model.filters=8", "algorithm.inner_steps=3"],
    "omniglot-5way-1shot-maml": ["model.filters=8", "train.meta_batch_size=6"],
    "omniglot-5way-1shot-reptile": ["model.filters=8", "algorithm.inner_steps=3"],
    "glyphs-5way-1shot-maml stale, rounded": ["model.filters=4", "tasks.train_queries=1", "train.meta_batch_size=6",
                                              "outer.stale=true", "train.precision=bfloat16"],
}  # fmt: skip
SMALL = [
    "train.steps=15", "train.shard_size=2", "validation.every=5", "validation.tasks=4", "evaluation.tasks=0",
    "algorithm.test_inner_steps=2", "checkpoint.every=5", "train.log_every=5",
]  # fmt: skip


def final_parameters(run: RunFolder) -> bytes:
    (path,) = run.checkpoints.glob("step-00000015")
    return (path / "meta.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_parameters_do_not_depend_on_the_layout(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, ray_cluster: None
) -> None:
    settings = [*SMALL, *CASES[name]]
    if name.startswith("omniglot"):
        settings.append(f"data_root={request.getfixturevalue('omniglot_root')}")

    def train(folder: str, workers: int, *more: str) -> RunFolder:
        return distmeta.train(
            name.split()[0], *settings, f"scaling.num_workers={workers}", f"run_dir={tmp_path / folder}", *more
        )

    straight = final_parameters(train("0", 0))
    for workers in (1, 2, 3) if name == "glyphs-5way-1shot-maml" else (3,):
        assert final_parameters(train(str(workers), workers)) == straight, f"{workers} workers"

    # The schedule of the whole run, of which only 8 steps are done before the stop.
    schedule = RunFolder.open(tmp_path / "0").config().outer.schedule
    stopped = train("stopped", 0, "train.steps=8", f"outer.schedule={json.dumps(schedule.model_dump())}")
    assert final_parameters(distmeta.resume(stopped.path, "train.steps=15", "scaling.num_workers=2")) == straight
    steps = [record["step"] for record in stopped.records() if record["kind"] == "train"]
    assert steps == [5, 8, 10, 15]


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"e-maml", "maml", "promp", "reptile"}))
def test_every_algorithm_keeps_the_law(name: str, tmp_path: Path, ray_cluster: None) -> None:
    """Straight in this process, and stopped and gone on with on a worker (those for control: with its tasks)."""
    algorithm = {"use": name} | ({"regularization": 1000.0, "inner_lr": 1e-4} if name == "imaml" else {})
    settings = ["model.filters=4", "train.meta_batch_size=4", "train.shard_size=2", "tasks.train_queries=2"]
    settings += ["validation.every=0", "evaluation.tasks=0", "checkpoint.every=2", "scaling.num_workers=0"]

    def train(folder: str, steps: int) -> RunFolder:
        overrides = [f"algorithm={json.dumps(algorithm)}", f"train.steps={steps}", f"run_dir={tmp_path / folder}"]
        return distmeta.train("glyphs-5way-1shot-maml", *settings, *overrides, "outer.schedule=null")

    straight, stopped = train("straight", 6), train("stopped", 3)
    distmeta.resume(stopped.path, "train.steps=6", "scaling.num_workers=1")
    one, other = ((run.checkpoints / "step-00000006" / "meta.safetensors").read_bytes() for run in (straight, stopped))
    assert one == other


@pytest.fixture
def small():
    return problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), Blobs())


@pytest.mark.parametrize("stale", [False, True])
def test_killed_workers_change_nothing(stale: bool, small, ray_cluster: None) -> None:
    """Nor when they are at shards of the step to come."""
    problem, theta = small
    steps = [shards_of("train", step, 12, 2) for step in range(30)]
    thetas = [theta + np.float32(0.001 * step) for step in range(30)]
    expected = [
        reduce_mean(InProcess(problem).map("meta_gradient", at, shards))
        for at, shards in zip(thetas, steps, strict=True)
    ]
    with RayPool(problem, Scaling(num_workers=2), most=6) as pool:
        done = threading.Event()

        def kill_now_and_then() -> None:
            while not done.wait(1.0):
                for process in [worker.process for worker in pool._workers.values()][:1]:
                    os.kill(process, signal.SIGKILL)

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        try:
            deadline = time.monotonic() + 120
            while pool.retries < 4 and time.monotonic() < deadline:
                for i, (shards, at, wanted) in enumerate(zip(steps, thetas, expected, strict=True)):
                    upcoming, ahead = steps[(i + 1) % 30], thetas[(i + 1) % 30] if stale else None
                    results = pool.map("meta_gradient", at, shards, upcoming, ahead=ahead)
                    assert np.array_equal(reduce_mean(results), wanted)
        finally:
            done.set()
            killer.join()
        assert pool.retries >= 4


class Poison(Blobs):
    """Blobs with one task that ends the process that builds it."""

    def sample(self, rng, split):
        task = super().sample(rng, split)
        if split == "val":
            os._exit(1)
        if split == "test":
            raise OSError("the disk is gone")
        return task


def test_a_task_that_ends_its_workers_is_named(ray_cluster: None) -> None:
    problem, theta = problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), Poison())
    with RayPool(problem, Scaling(num_workers=1), most=2) as pool:
        with pytest.raises(WorkerError, match=r"tasks 0-1 of step 0 \(split val\) have lost 4 workers"):
            pool.map("evaluate", theta, shards_of("val", 0, 2, 2))
    with RayPool(problem, Scaling(num_workers=1), most=2) as pool:
        wrong = theta[:-3]  # a vector that does not fit the model: the worker's error arrives as one line
        with pytest.raises(WorkerError, match=r"evaluate of tasks 0-1 of step 0 .* failed: ValueError: a vector of"):
            pool.map("evaluate", wrong, shards_of("train", 0, 2, 2))
        with pytest.raises(WorkerError, match=r"building task 0 of step 0 .* OSError: the disk is gone"):
            pool.map("evaluate", theta, shards_of("test", 0, 2, 2))


@pytest.mark.parametrize("where", ["here", "actors"])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_a_loss_that_is_not_finite_names_its_task(where: str, strategy: str, small, ray_cluster: None) -> None:
    problem, theta = small
    problem.strategy = strategy
    bad = np.full_like(theta, np.nan)
    pool = InProcess(problem) if where == "here" else RayPool(problem, Scaling(num_workers=2), most=2)
    with pool, pytest.raises(NumericalError, match=r"task 0 of step 4 \(split train, seed 1\) is nan"):
        pool.map("meta_gradient", bad, shards_of("train", 4, 4, 2))


class Unloadable(Blobs):
    """Blobs that can be sent, but not be built at the other end."""

    def __reduce__(self):
        return __import__, ("no_such_module",)


def test_a_problem_that_a_worker_cannot_build_is_said_in_one_line(ray_cluster: None) -> None:
    problem, _ = problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), Unloadable())
    with pytest.raises(WorkerError, match=r"importable there\) failed: ModuleNotFoundError: No module named 'no_such_"):
        RayPool(problem, Scaling(num_workers=1), most=1)


def test_asking_for_more_than_the_cluster_has_lists_both(small, ray_cluster: None) -> None:
    problem, _ = small
    with pytest.raises(ResourceError, match="9 workers need 9 CPU; the cluster has 4 CPU"):
        RayPool(problem, Scaling(num_workers=9), most=9)
    with pytest.raises(ResourceError, match="1 workers need 1 CPU, 1 GPU; the cluster has 4 CPU, 0 GPU"):
        RayPool(problem, Scaling(num_workers=1, use_gpu=True), most=9)


def test_automatic_workers_are_no_more_than_cores_or_shards(small, ray_cluster: None) -> None:
    problem, _ = small
    for most, expected in ((2, 2), (9, 4)):
        with RayPool(problem, Scaling(), most=most) as pool:
            assert pool.size == expected
    assert ray.is_initialized()  # a pool ends only a cluster that it has started


def test_workers_are_called_by_their_run(small, ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    """On Ray's dashboard, before each line of their logs and in messages; two runs of one name get on together."""
    problem, theta = small
    one = Scaling(num_workers=1)
    with RayPool(problem, one, 4, "rates") as pool, RayPool(problem, one, 4, "rates"):
        names = [name for name in ray.util.list_named_actors() if name.startswith("rates worker 0 (")]
        assert len(set(names)) == 2
        (worker,) = pool._workers
        assert ray.get(worker.__ray_call__.remote(repr)) == "rates worker 0"
        os.kill(pool._workers[worker].process, signal.SIGKILL)
        pool.map("meta_gradient", theta, shards_of("train", 0, 4, 2))
        assert "rates worker 0 on " in caplog.text and "was lost at tasks 0-1 of step 0" in caplog.text
        assert [state.label for state in pool._workers.values()] == ["rates worker 1"]
        titles = our_processes()
        assert sum(title.startswith("ray::Worker") for title in titles) >= 2, titles


def test_prepared_tasks_are_used_and_change_nothing(small, ray_cluster: None) -> None:
    problem, theta = small
    steps = [shards_of("train", step, 8, 2) for step in range(4)]
    with RayPool(problem, Scaling(num_workers=2), most=4) as pool:
        for shards, upcoming in zip(steps, [*steps[1:], []], strict=True):
            results = pool.map("meta_gradient", theta, shards, upcoming)
            expected = InProcess(problem).map("meta_gradient", theta, shards)
            for one, other in zip(results, expected, strict=True):
                assert np.array_equal(one.total, other.total)
                assert one.metrics.keys() == other.metrics.keys()

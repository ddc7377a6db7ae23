"""What must hold on a GPU; skipped where torch sees none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, cli, digest
from problems import Blobs, algorithms, problem_of, relative_error, small_models
from test_text_models import models as text_models
from torch import nn

from distmeta import MAML
from distmeta.config import Scaling
from distmeta.core.types import Batch, Metrics, Params
from distmeta.distributed.compiled import Programs
from distmeta.distributed.executor import InProcess, reduce_mean
from distmeta.distributed.ray import RayPool
from distmeta.distributed.work import Problem, Shard, ShardResult, shards_of
from distmeta.errors import ConfigError
from distmeta.models import MLP, Conv4

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

SHARD = Shard("train", 0, 0, 3)


def agree(one: ShardResult, other: ShardResult, tolerance: float) -> None:
    """Same meta-gradients and metrics, but for rounding."""
    if other.total is not None:
        assert one.total is not None
        assert relative_error(one.total, other.total) < tolerance
    assert one.metrics.keys() == other.metrics.keys()
    for name, values in other.metrics.items():
        np.testing.assert_allclose(one.metrics[name], values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(algorithms()))
@pytest.mark.parametrize("model", sorted(small_models(torch.float64)))
def test_it_computes_what_the_processor_does(model: str, name: str) -> None:
    module, shape = small_models(torch.float64)[model]
    problem, theta = problem_of(algorithms()[name], module, Blobs(shape, dtype=torch.float64))
    evaluation = Shard("test", 0, 0, 2)
    here = problem.run("meta_gradient", theta, SHARD), problem.run("evaluate", theta, evaluation)
    problem.device = "cuda"
    there = problem.run("meta_gradient", theta, SHARD), problem.run("evaluate", theta, evaluation)
    for one, other in zip(there, here, strict=True):
        agree(one, other, 1e-8)


@pytest.mark.parametrize("name", sorted(text_models()))
def test_it_computes_what_the_processor_does_of_texts(name: str) -> None:
    module, tasks, loss = text_models()[name]
    problem, theta = problem_of(MAML(inner_lr=0.1, inner_steps=2), module, tasks, loss=loss)
    here = problem.run("meta_gradient", theta, SHARD)
    problem.device = "cuda"
    agree(problem.run("meta_gradient", theta, SHARD), here, 1e-8)


def images(strategy: str, device: str = "cuda", downsample: str = "pool") -> tuple[Problem, np.ndarray]:
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 3, filters=16, downsample=downsample, head="flatten")  # pyright: ignore
    tasks = Blobs((1, 28, 28), shots=5)
    return problem_of(MAML(inner_lr=0.1), model, tasks, strategy=strategy, device=device)


@pytest.mark.parametrize(
    "strategy, downsample",
    [("loop", "pool"), ("loop", "stride"), ("vmap", "pool"), ("vmap", "stride"), ("compiled", "pool")],
)
def test_strategies_keep_single_precision(strategy: str, downsample: str) -> None:
    """Convolutions on a GPU would else round to 11 bits. In the median, since rounding may choose another maximum."""
    (expected, theta), (problem, _) = images("loop", "cpu", downsample), images(strategy, "cuda", downsample)
    errors: list[float] = []
    for step in range(5):
        shard = Shard("train", step, 0, 3)
        one, other = (given.run("meta_gradient", theta, shard).total for given in (problem, expected))
        assert one is not None and other is not None
        errors.append(relative_error(one, other))
    assert sorted(errors)[2] < 1e-4, errors
    fresh, _ = images(strategy, "cuda", downsample)
    first, second = (fresh.run("meta_gradient", theta, shard).total for _ in range(2))
    assert first is not None and second is not None
    assert np.array_equal(one, first), "nothing of what was computed before is left"
    assert np.array_equal(one, second)


def test_what_cannot_be_recorded_is_refused() -> None:
    def waits(params: Params, support: Batch, query: Batch) -> tuple[Params, Metrics]:
        return {"w": params["w"] * float(support[0].sum())}, {}

    x = (torch.ones(3, device="cuda"),)
    with pytest.raises(ConfigError, match=r"cannot be recorded as a CUDA graph .*set train\.strategy=vmap"):
        Programs()._recorded(waits, {"w": torch.ones(2, device="cuda")}, x, x)
    problem, theta = images("vmap")
    assert problem.run("meta_gradient", theta, SHARD).total is not None, "the GPU is as it was"


def test_dropout_is_drawn_as_without_a_compiler() -> None:
    def problem(strategy: str) -> tuple[Problem, np.ndarray]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3))
        return problem_of(MAML(inner_lr=0.1, inner_steps=2), model, Blobs(), strategy=strategy, device="cuda")

    (vmap, theta), (compiled, _) = problem("vmap"), problem("compiled")
    for step in (0, 1):
        shard = Shard("train", step, 0, 3)
        agree(compiled.run("meta_gradient", theta, shard), vmap.run("meta_gradient", theta, shard), 1e-5)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("strategy", ["loop", "vmap", "compiled"])
def test_workers_share_a_gpu(strategy: str, workers: int, ray_cluster: None) -> None:
    """One worker has it to itself, two have a half each; either way the bits are those of this process on it."""
    problem, theta = problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), Blobs(), device="cuda", strategy=strategy)
    shards = shards_of("train", 0, 8, 2)
    alone = reduce_mean(InProcess(problem).map("meta_gradient", theta, shards))
    scaling = Scaling(num_workers=workers, use_gpu=True, gpus_per_worker=1 / workers)
    with RayPool(problem, scaling, most=4) as pool:
        pool._wait_for(workers)
        assert np.array_equal(reduce_mean(pool.map("meta_gradient", theta, shards)), alone)
        assert all(s.hardware.startswith(torch.cuda.get_device_name()) for s in pool._workers.values())


def test_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    """In the driver's process, with a worker, and stopped and resumed."""
    settings = [*TINY, "scaling.use_gpu=true", "outer.schedule=null"]
    for name, *own in (("alone",), ("worker", "scaling.num_workers=1"), ("stopped", "train.steps=4")):
        result = cli("train", *settings, *own, f"run_dir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    result = cli("resume", tmp_path / "stopped", "train.steps=6")
    assert result.returncode == 0, result.stderr
    assert len({digest(tmp_path / name, 6) for name in ("alone", "worker", "stopped")}) == 1


def test_control(tmp_path: Path) -> None:
    """Policies act on the processor's environments with parameters that lie on the GPU."""
    settings = ["train.steps=2", "train.meta_batch_size=4", "validation.every=0", "evaluation.tasks=4"]
    settings += ["scaling.use_gpu=true", "scaling.num_workers=0", f"run_dir={tmp_path / 'run'}"]
    result = cli("train", "navigation-maml-trpo", *settings)
    assert result.returncode == 0, result.stderr

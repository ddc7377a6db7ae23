"""Meta-gradients as compiled programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Blobs, HeadedMLP, algorithms, problem_of, relative_error
from ray import cloudpickle
from torch import nn
from torch._inductor import config as inductor

import distmeta
from distmeta import MAML, RunFolder
from distmeta.core.types import Batch, Metrics, Params
from distmeta.distributed import compiled
from distmeta.distributed.compiled import AtOnce
from distmeta.distributed.work import Problem, Shard
from distmeta.errors import ConfigError

SHARD = Shard("train", 0, 0, 3)


def problem(strategy: str, *middle: nn.Module) -> tuple[Problem, np.ndarray]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *middle, nn.Linear(4, 3))
    return problem_of(MAML(inner_lr=0.1, inner_steps=2), model, Blobs(), strategy=strategy)


def test_a_program_computes_what_it_was_made_of() -> None:
    """With dropout, whose masks are those of uncompiled code; whether the program has just been made or not."""
    (vmap, theta), (ours, _) = (problem(strategy, nn.Dropout(0.3)) for strategy in ("vmap", "compiled"))
    expected = vmap.run("meta_gradient", theta, SHARD)
    first, second = (ours.run("meta_gradient", theta, SHARD) for _ in range(2))
    assert first.total is not None and second.total is not None and expected.total is not None
    assert relative_error(first.total, expected.total) < 1e-6
    assert np.array_equal(first.total, second.total)
    np.testing.assert_allclose(first.metrics["loss"], expected.metrics["loss"], rtol=1e-6)
    other = ours.run("meta_gradient", theta + 0.1, Shard("train", 1, 0, 3))
    fresh = vmap.run("meta_gradient", theta + 0.1, Shard("train", 1, 0, 3))
    assert other.total is not None and fresh.total is not None
    assert relative_error(other.total, fresh.total) < 1e-6, "nothing of the first data is left in the program"
    assert not cloudpickle.loads(cloudpickle.dumps(ours)).programs._kept


def test_a_program_rounds_to_bfloat16_where_its_model_does() -> None:
    """The compiler would keep in single precision what lies between two products."""
    found = {}
    for strategy, precision in (("vmap", "float32"), ("vmap", "bfloat16"), ("compiled", "bfloat16")):
        torch.manual_seed(0)
        made, theta = problem_of(MAML(inner_lr=0.1), HeadedMLP(3, 3), Blobs(), strategy=strategy, precision=precision)
        found[strategy, precision] = made.run("meta_gradient", theta, SHARD).total
    exact, rounded, ours = found.values()
    assert relative_error(ours, rounded) < 0.5 * relative_error(rounded, exact)


def test_parameters_do_not_depend_on_the_workers(tmp_path: Path, ray_cluster: None) -> None:
    """Driver and workers compile for themselves."""

    def train(workers: int) -> RunFolder:
        settings = ["train.strategy=compiled", "train.meta_batch_size=8", "train.shard_size=4", "train.steps=5"]
        settings += ["validation.every=0", "evaluation.tasks=0", "model.hidden=[4]"]
        folder = tmp_path / str(workers)
        return distmeta.train("sinusoid-maml", *settings, f"scaling.num_workers={workers}", f"run_dir={folder}")

    with inductor.patch(force_disable_caches=True):
        runs = train(0), train(2)
    one, other = ((run.checkpoints / "step-00000005" / "meta.safetensors").read_bytes() for run in runs)
    assert one == other


@pytest.mark.parametrize("name", sorted(algorithms()))
def test_steps_of_one_phase_are_one_function(name: str) -> None:
    """Else the program of an early step would be used in a later one."""
    given, theta = problem_of(algorithms()[name], HeadedMLP(3, 3), Blobs())
    task = given.build(SHARD)[:1]
    phases: dict[object, np.ndarray] = {}
    for step in (0, 1, 3, 10, 1000):
        total = given.run("meta_gradient", theta, Shard("train", step, 0, 1), task).total
        assert total is not None
        assert np.array_equal(phases.setdefault(given.algorithm.phase(step), total), total)
    assert len(phases) > 1 or name not in ("maml-pp-annealed", "maml-pp-multi-step", "reptile")


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    many = ["algorithm.use=maml-pp", "algorithm.multi_step_until=50", "train.steps=60", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"MAMLpp changes 50 times in 60 outer steps.*set train\.strategy=vmap"):
        distmeta.train("sinusoid-maml", "train.strategy=compiled", *many)
    assert not (tmp_path / "run").exists()
    given, theta = problem("compiled", nn.Dropout(0.3))
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
            given.run("meta_gradient", theta, SHARD)
    monkeypatch.setattr(compiled, "MOST", 0)
    with pytest.raises(ConfigError, match=r"one program for each form .* more than 0: set train\.strategy=vmap"):
        given.run("meta_gradient", theta, SHARD)
    monkeypatch.setattr(compiled, "MOST", 1)

    def wrong(function: AtOnce, **options: Any) -> AtOnce:
        def program(*arguments: Any) -> Any:
            gradient, metrics = function(*arguments)
            return {name: 1.01 * tensor for name, tensor in gradient.items()}, metrics

        return program

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(ConfigError, match=r"another meta-gradient than vmap does .*set train\.strategy=vmap"):
        given.run("meta_gradient", theta, SHARD)


@pytest.mark.parametrize("factor, sound", [(1.01, True), (9.0, False)])
def test_a_program_may_differ_by_what_a_last_bit_makes(
    factor: float, sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numbers some last bits above 1, which of them are left after subtracting 1 is no fault of the compiler's."""

    def cancelling(params: Params, support: Batch, query: Batch) -> tuple[Params, Metrics]:
        return {"w": params["w"] - 1}, {}

    def compiler(function: AtOnce, **options: Any) -> AtOnce:
        return lambda *given: ({name: factor * tensor for name, tensor in function(*given)[0].items()}, {})

    monkeypatch.setattr(torch, "compile", compiler)
    params, x = {"w": 1 + 8 * torch.finfo(torch.float32).eps * torch.ones(100)}, (torch.zeros(1),)
    if sound:
        program = compiled.Programs().of("key", cancelling, params, x, x)
        assert torch.equal(program(params, x, x)[0]["w"], factor * (params["w"] - 1))
        return
    with pytest.raises(ConfigError, match=r"another meta-gradient than vmap does \(relative difference 8"):
        compiled.Programs().of("key", cancelling, params, x, x)

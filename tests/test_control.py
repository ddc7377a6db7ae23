"""Tasks of control: what is sampled, how it is learned from, and that nothing depends on who samples it."""

from __future__ import annotations

import ctypes.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from problems import relative_error

import distmeta
from distmeta import EMAML, MAML, MAMLpp, MetaSGD, ProMP, RunFolder
from distmeta.core.algorithm import Bilevel
from distmeta.core.params import Layout, join, split
from distmeta.core.policy import PolicyLoss, Rollouts
from distmeta.distributed.executor import InProcess, MetaBatch, reduce_mean
from distmeta.distributed.work import Problem, Shard, shards_of
from distmeta.errors import ConfigError
from distmeta.models.policy import MLPPolicy
from distmeta.tasks.control import Outcome
from distmeta.tasks.navigation import Navigation, Points

ALGORITHMS = {
    "maml": MAML(inner_lr=0.1),
    "maml-2": MAML(inner_lr=0.1, inner_steps=2),
    "anil": MAML(inner_lr=0.1, adapted_params=("head.*", "log_std")),
    "meta-sgd": MetaSGD(inner_lr=0.1),
    "maml-pp": MAMLpp(inner_lr=0.1, inner_steps=2),
    "promp": ProMP(),
    "e-maml": EMAML(),
    "e-maml-2": EMAML(inner_steps=2, exploration=5.0),
}
ONLY = {"promp": "lvc", "e-maml": "log", "e-maml-2": "log"}  # the estimator that an algorithm needs


def problem_with(
    tasks: Any, algorithm: Any, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> tuple[Problem, np.ndarray]:
    torch.manual_seed(0)
    shape, actions, kind = tasks.spaces
    module = MLPPolicy(shape, actions, kind == "categorical", hidden=(8,)).to(dtype)
    module.body.append(torch.nn.Dropout(dropout))
    loss = PolicyLoss(module, tasks.spec.loss)
    tasks.bind(loss)
    initial = join(algorithm.init(loss.init()))
    layout = Layout.of(initial)
    return Problem(algorithm, loss, tasks, layout, seed=1), layout.pack(initial)


@pytest.fixture
def points() -> Navigation:
    return Navigation(episodes=4, horizon=6)


def data_of(problem: Problem, theta: np.ndarray, number: int = 0) -> Rollouts:
    (task,) = problem.build(Shard("train", 0, number, 1))
    return Rollouts(*task.query(split(problem.layout.unpack(theta)).model))


def test_rollouts_hold_what_happened(points: Navigation) -> None:
    problem, theta = problem_with(points, MAML())
    (task,) = problem.build(Shard("train", 0, 0, 1))
    params = split(problem.layout.unpack(theta)).model
    data = Rollouts(*task.support(params, 0))
    assert [tuple(t.shape) for t in data] == [(4, 6, 2), (4, 6, 2), (4, 6, 4), (4, 6), (4, 6), (4, 1)]
    position = np.zeros((4, 2))
    total = np.zeros(4)
    for t in range(6):
        assert relative_error(data.observation_ETO[:, t] + 1, position + 1) < 1e-6
        assert torch.equal(data.output_ETP[:, t], problem.loss.predict(params, data.observation_ETO[:, t]))
        position = position + 0.1 * np.clip(data.action_ETA[:, t].numpy(), -1, 1)
        total -= np.linalg.norm(position - task.goal, axis=1)
    assert relative_error(data.score_EM[:, 0], total) < 1e-5
    assert float(data.advantage_ET.mean()) == pytest.approx(0, abs=1e-6)
    assert float(data.advantage_ET.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_sets_are_functions_of_task_and_parameters(points: Navigation) -> None:
    problem, theta = problem_with(points, MAML())
    (task,), (same,) = problem.build(Shard("train", 3, 0, 1)), problem.build(Shard("train", 3, 0, 1))
    params = split(problem.layout.unpack(theta)).model
    first = task.support(params, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same.support(params, 0), strict=True))
    assert not torch.equal(first[1], task.support(params, 1)[1]), "each inner step has a stream of its own"
    assert not torch.equal(first[1], task.query(params)[1]), "so has the query set"
    other = problem.build(Shard("train", 3, 1, 1))[0]
    assert not np.array_equal(task.goal, other.goal)


class Stopping(Points):
    """Ends episode e after step 2 + e."""

    def reset(self, goal: Any, seeds: Sequence[int]) -> np.ndarray:
        self.steps = 0
        return super().reset(goal, seeds)

    def step(self, action_EA: np.ndarray) -> Outcome:
        self.steps += 1
        return super().step(action_EA)._replace(ended_E=np.arange(self.points) + 2 <= self.steps)


class Short(Navigation):
    def simulator(self, goal: Any, episodes: int) -> Stopping:
        return Stopping(episodes)


def test_episodes_that_end_early_are_padded() -> None:
    problem, theta = problem_with(Short(episodes=3, horizon=50), MAML())
    data = data_of(problem, theta)
    assert data.valid_ET.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], "none goes on for 50 steps"
    assert not data.advantage_ET[data.valid_ET == 0].any()
    value, metrics = problem.loss(split(problem.layout.unpack(theta)).model, data)
    changed = data._replace(observation_ETO=torch.where(data.valid_ET[..., None] == 0, 9.0, data.observation_ETO))
    assert float(problem.loss(split(problem.layout.unpack(theta)).model, changed)[0]) == pytest.approx(float(value))
    assert set(metrics) == {"return"}


@pytest.mark.parametrize(
    ("name", "estimator"), [(n, e) for n in ALGORITHMS for e in ("lvc", "dice", "log") if e == ONLY.get(n, e)]
)
def test_meta_gradient_and_curvature_by_finite_differences(name: str, estimator: str) -> None:
    """Of the objective and of the divergence as functions of all meta-parameters, on data sampled once.

    Away from the parameters that sampled the data, where nothing vanishes.
    """
    algorithm = ALGORITHMS[name]
    problem, theta = problem_with(Navigation(4, 6, estimator=estimator), algorithm, torch.float64)
    assert isinstance(algorithm, Bilevel)
    shard, rng, length = Shard("train", 3, 0, 2), np.random.default_rng(0), 1e-6
    problem.run("meta_gradient", theta, shard)
    recorded = problem.recordings.of(theta, shard)
    assert recorded is not None
    tasks = list(recorded[0].values())
    at = theta + 0.02 * rng.standard_normal(theta.size)

    def value(vector: np.ndarray, what: str) -> float:
        metrics = problem.run("objective", theta, shard, second=vector).metrics
        return float(metrics[what].sum())

    gradient = problem.run("meta_gradient", theta, shard, second=at).total
    divergence = lambda vector: gradient_of_divergence(problem, algorithm, tasks, vector)  # noqa: E731
    for _ in range(3):
        direction = rng.standard_normal(theta.size)
        direction /= np.linalg.norm(direction)
        numeric = (value(at + length * direction, "loss") - value(at - length * direction, "loss")) / (2 * length)
        assert gradient @ direction == pytest.approx(numeric, rel=1e-6, abs=1e-8)
        product = problem.run("curvature", theta, shard, second=direction).total
        numeric = (divergence(theta + length * direction) - divergence(theta - length * direction)) / (2 * length)
        assert relative_error(product, numeric) < 1e-5
    assert value(theta, "kl") == pytest.approx(0, abs=1e-12)
    assert value(at, "kl") > 1e-6


def gradient_of_divergence(problem: Problem, algorithm: Bilevel, tasks: Any, vector: np.ndarray) -> np.ndarray:
    joined = {name: tensor.requires_grad_() for name, tensor in problem.layout.unpack(vector).items()}
    assert isinstance(problem.loss, PolicyLoss)
    total = sum(algorithm.divergence(split(joined), task, problem.loss, step=3) for task in tasks)
    return problem.layout.pack(dict(zip(joined, torch.autograd.grad(total, list(joined.values())), strict=True)))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_data_are_sampled_once_for_all_passes(points: Navigation, dropout: float) -> None:
    """A pass at the parameters of the first has its bits; another worker's, which samples anew, too."""
    problem, theta = problem_with(points, MAML(inner_lr=0.1), dropout=dropout)
    shards = shards_of("train", 2, 4, 2)
    executor = InProcess(problem)
    first = reduce_mean(executor.map("meta_gradient", theta, shards))
    batch = MetaBatch(executor, theta, shards)
    away = theta + np.float32(0.01)
    kept = batch.gradient(theta), batch.objective(away), batch.curvature(first)
    fresh, another = (
        problem_with(Navigation(episodes=4, horizon=6), MAML(inner_lr=0.1), dropout=dropout)[0] for _ in range(2)
    )
    assert np.array_equal(kept[0], MetaBatch(InProcess(another), theta, shards).gradient(theta))
    redone = MetaBatch(InProcess(fresh), theta, shards)
    if not dropout:  # masks depend on how many have been drawn before
        assert np.array_equal(kept[0], first)
    assert kept[1] == redone.objective(away)
    assert np.array_equal(kept[2], redone.curvature(first))
    assert not np.array_equal(first, reduce_mean(executor.map("meta_gradient", theta, shards_of("train", 3, 4, 2))))


SETTINGS = [
    "train.meta_batch_size=4", "train.shard_size=1", "validation.tasks=4", "evaluation.tasks=4", "checkpoint.every=2",
    "model.hidden=[8]",
]  # fmt: skip
CASES = {
    "navigation-maml-trpo": ["tasks.episodes=4", "tasks.horizon=10", "train.steps=6", "validation.every=3"],
    "navigation-promp": ["tasks.episodes=4", "tasks.horizon=10", "train.steps=6", "validation.every=3"],
    "navigation-maml-trpo, e-maml": [
        "algorithm={use: e-maml, inner_lr: 0.5, inner_steps: 2}", "tasks.estimator=log", "tasks.episodes=4",
        "tasks.horizon=10", "train.steps=3", "validation.every=0",
    ],
    "ml1-reach-maml-trpo": [
        "tasks.episodes=2", "tasks.horizon=8", "tasks.test_horizon=8", "train.steps=3", "validation.every=0",
    ],
}  # fmt: skip


def final_parameters(run: RunFolder) -> bytes:
    return max(run.checkpoints.glob("step-*")).joinpath("meta.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_parameters_do_not_depend_on_the_layout(name: str, tmp_path: Path, ray_cluster: None) -> None:
    settings = [*SETTINGS, *CASES[name]]

    def train(folder: str, *more: str) -> RunFolder:
        return distmeta.train(name.partition(",")[0], *settings, f"run_dir={tmp_path / folder}", *more)

    straight = train("0", "scaling.num_workers=0")
    assert final_parameters(train("2", "scaling.num_workers=2")) == final_parameters(straight)
    stopped = train("stopped", "scaling.num_workers=1", "train.steps=2")
    steps = straight.config().train.steps
    gone_on = distmeta.resume(stopped.path, f"train.steps={steps}", "scaling.num_workers=0")
    assert final_parameters(gone_on) == final_parameters(straight)
    summary = json.loads((straight.path / "summary.json").read_text())
    assert summary["test"]["metric"] == ("success" if name.startswith("ml1") else "return")
    assert json.loads((gone_on.path / "summary.json").read_text())["test"] == summary["test"]
    for record in straight.records():
        if record["kind"] == "train" and "trpo" in name:
            assert record["kl"] <= straight.config().outer.trust_region.max_kl


class Mortal(Navigation):
    """The first process to sample at all dies at its tenth sampling, in the middle of a step's passes."""

    marker = ""
    sampled = 0

    def simulator(self, goal: Any, episodes: int) -> Points:
        self.sampled += 1
        if self.sampled == 10 and self.marker and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().simulator(goal, episodes)


def test_a_worker_lost_with_its_data_changes_nothing(tmp_path: Path, ray_cluster: None) -> None:
    def train(folder: str, workers: int, marker: str) -> RunFolder:
        tasks = Mortal(episodes=4, horizon=10)
        tasks.marker = marker
        more = ["train.steps=4", "validation.every=0", "evaluation.tasks=0", f"scaling.num_workers={workers}"]
        return distmeta.train("navigation-maml-trpo", *SETTINGS, *more, f"run_dir={tmp_path / folder}", tasks=tasks)

    straight, struck = train("straight", 0, ""), train("struck", 2, str(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()
    assert [r["retries"] for r in struck.records() if r["kind"] == "train"][-1] >= 1
    assert final_parameters(struck) == final_parameters(straight)


def test_navigation_is_learned(tmp_path: Path) -> None:
    """A few steps bring the return after adaptation far above that of the untrained policy."""
    run = distmeta.train(
        "navigation-maml-trpo", "model.hidden=[16]", "train.steps=25", "train.meta_batch_size=8", "tasks.episodes=10",
        "validation.every=0", "evaluation.tasks=20", "scaling.num_workers=0", "outer.trust_region.max_kl=0.05",
        f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["test"]["after"]["mean"] > summary["untrained"]["after"]["mean"] + 30
    assert (run.path / "report" / "episode.png").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.benchmark=ML1-reech"], r"tasks.benchmark: Meta-World has no 'ML1-reech'; did you mean 'ML1-reach'"),
        (["tasks.horizon=600"], "tasks.horizon and tasks.test_horizon can be at most 500"),
        (["tasks.episodes=0"], "tasks.episodes must be at least 1; given: 0"),
        (["tasks.discount=1.5"], "tasks.discount must be between 0 and 1; given: 1.5"),
        (["outer.lr=0.1"], "outer.trust_region finds the whole step itself: it needs use: SGD and lr: 1"),
        (["outer.passes=2"], "outer.trust_region takes one step; leave outer.passes at 1"),
        (["model.use=mlp"], "a policy for 4 gaussian actions puts out 8 numbers an observation; .* shape \\(1, 4\\)"),
        (["model.initial_std=0"], "model.initial_std must be a number above 0; given: 0"),
        (["loss=mse"], "tasks of control have a loss of their own; leave out loss: mse"),
        (["algorithm.use=reptile"], "outer.trust_region needs an algorithm that descends the query loss, which rep"),
        (["train.strategy=vmap"], "train.strategy: vmap needs supervised episodes; these tasks want train.strat"),
        (["tasks={use: gym, env: Nowhere-v9}"], "tasks.env: gymnasium cannot make 'Nowhere-v9'"),
        (["tasks={use: gym, env: Blackjack-v1}"], "observations must be vectors; the environment gives Tuple"),
        (["tasks.use=sinusoid"], "outer.trust_region goes over data that were sampled with a policy; sinusoid are no"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        distmeta.train("ml1-reach-maml-trpo", "scaling.num_workers=0", f"run_dir={tmp_path / 'run'}", *overrides)
    assert not (tmp_path / "run").exists()


def test_multi_step_loss_is_for_supervised_tasks(points: Navigation) -> None:
    problem, theta = problem_with(points, MAMLpp(inner_lr=0.1, inner_steps=2, multi_step_until=10))
    with pytest.raises(ConfigError, match="multi_step_until judges every inner step by one query set"):
        problem.run("meta_gradient", theta, Shard("train", 0, 0, 1))


@pytest.mark.parametrize("name", ["promp", "e-maml"])
def test_some_algorithms_are_for_control_alone(name: str, points: Navigation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"algorithm {name} is for tasks of control"):
        distmeta.train(
            "sinusoid-maml", f"algorithm={{use: {name}}}", "scaling.num_workers=0", f"run_dir={tmp_path / 'run'}"
        )
    problem, theta = problem_with(Navigation(4, 6, estimator="dice"), ALGORITHMS[name])
    with pytest.raises(ConfigError, match=f"algorithm {name} .*: it needs tasks.estimator: {ONLY[name]}"):
        problem.run("meta_gradient", theta, Shard("train", 0, 0, 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on Meta-World that has learned next to nothing."""
    path = tmp_path_factory.mktemp("trained") / "run"
    settings = [*SETTINGS, *CASES["ml1-reach-maml-trpo"], "train.steps=1", "evaluation.tasks=0"]
    distmeta.train("ml1-reach-maml-trpo", *settings, "scaling.num_workers=0", f"run_dir={path}")
    return path


def adapt(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distmeta", "adapt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=200)


def test_a_policy_is_adapted_to_an_unseen_goal(trained: Path, tmp_path: Path) -> None:
    film = ["--film"] if ctypes.util.find_library("OSMesa") else []
    done = adapt(trained, "--task", 2, "--out", tmp_path / "out", *film, MUJOCO_GL="osmesa" if film else "")
    assert done.returncode == 0, done.stderr
    assert "success" in done.stdout
    saved = safetensors.torch.load_file(tmp_path / "out" / "rollouts.safetensors")
    adapted = safetensors.torch.load_file(tmp_path / "out" / "adapted.safetensors")
    assert saved["1.observation_ETO"].shape == (2, 8, 39)
    start = RunFolder.open(trained).checkpoint("best").params
    assert all(adapted[name.removeprefix("model.")].shape == tensor.shape for name, tensor in start.items())
    assert not torch.equal(adapted["head.bias"], start["model.head.bias"])
    assert (tmp_path / "out" / "paths.png").exists()
    if film:
        with Image.open(tmp_path / "out" / "after.gif") as picture:
            assert picture.n_frames == 2
            assert picture.size == (320, 320)
    again = adapt(trained, "--task", 2, "--out", tmp_path / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists already; choose another folder with --out" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "adapt takes --support and --query, files of yours; or, for a run on control, --task instead"),
        (["--task", 1, "--support", "x"], "adapt takes --support and --query, files of yours; or"),
        (["--support", "x", "--query", "y"], "metaworld, which reads no tasks from files"),
        (["--task", -1], "Invalid value for '--task'"),
    ],
)
def test_what_cannot_be_adapted_to_is_refused(arguments: list, message: str, trained: Path, tmp_path: Path) -> None:
    done = adapt(trained, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_reptile_and_discrete_actions(tmp_path: Path) -> None:
    """Any algorithm that needs no labels, any environment of gymnasium."""
    run = distmeta.train(
        {"tasks": {"use": "gym", "env": "CartPole-v1", "episodes": 2, "horizon": 10}, "model": {"use": "policy"}},
        "algorithm={use: reptile, inner_optimizer: sgd, inner_lr: 0.1}", "outer={use: SGD, lr: 1.0}", "train.steps=2",
        "train.meta_batch_size=2", "validation.every=0", "evaluation.tasks=2", "scaling.num_workers=0",
        f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert json.loads((run.path / "summary.json").read_text())["test"]["after"]["mean"] > 5, "a pole takes time to fall"

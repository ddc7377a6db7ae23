"""Warped gradients and learned update rules against what their papers say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import Blobs, HeadedMLP, problem_of, relative_error
from torch import Tensor, nn

from distmeta import MAML, LearnedOptimizer, WarpGrad
from distmeta.algorithms.learned_optimizer import _features
from distmeta.core.loss import cross_entropy
from distmeta.core.params import join, split
from distmeta.core.types import MetaParams
from distmeta.distributed.work import Problem, Shard
from distmeta.errors import ConfigError

DOUBLE = torch.float64
SHARD = Shard("train", 0, 0, 1)


class Warped(nn.Module):
    """A perceptron with a warp layer that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 8)
        self.warp = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.warp(self.body(x).tanh()))


def problem_and_theta(algorithm, network: nn.Module, seed: int = 0) -> tuple[Problem, np.ndarray]:
    """In double precision, away from where extra meta-parameters start."""
    problem, theta = problem_of(algorithm, network.to(DOUBLE), Blobs(dtype=DOUBLE))
    return problem, theta + 0.1 * np.random.default_rng(seed).standard_normal(theta.size)


def test_warp_layers_of_one_step_have_maml_s_gradient() -> None:
    """With K = 1 there is one point, theta_0: MAML that freezes the warp layers, first-order for the others."""
    torch.manual_seed(0)
    algorithm = WarpGrad(inner_lr=0.3, inner_steps=1, warp_params=("warp.*",))
    problem, theta = problem_and_theta(algorithm, Warped())
    ours = split(problem.layout.unpack(problem.run("meta_gradient", theta, SHARD).total)).model
    for first_order in (False, True):
        maml = MAML(inner_lr=0.3, frozen_params=("warp.*",), first_order=first_order)
        other, _ = problem_of(maml, problem.loss.module, Blobs(dtype=DOUBLE))
        theirs = split(other.layout.unpack(other.run("meta_gradient", theta, SHARD).total)).model
        for name, tensor in theirs.items():
            if name.startswith("warp") != first_order:
                assert relative_error(ours[name], tensor) < 1e-12, name


@pytest.mark.parametrize("own", [True, False])
def test_warp_gradient_is_that_of_the_mean_over_the_path(own: bool) -> None:
    """Central differences of the published objective, with the points of the path held where they are."""
    torch.manual_seed(0)
    algorithm = WarpGrad(inner_lr=0.3, inner_steps=3, warp_params=("warp.*",) if own else ())
    problem, theta = problem_and_theta(algorithm, Warped() if own else HeadedMLP(3, 3))
    (task,) = problem.build(SHARD)
    meta = split(problem.layout.unpack(theta))
    points = [at.params for at in algorithm._path(meta, task, problem.loss, 3)][:-1]
    is_warp = np.concatenate(
        [
            np.full(tensor.numel(), name.startswith("extra.") or name.startswith("model.warp"))
            for name, tensor in problem.layout.unpack(theta).items()
        ]
    )

    def objective(vector: np.ndarray) -> float:
        at = split(problem.layout.unpack(vector))
        total = 0.0
        for point in points:
            start = {name: at.model[name] if name.startswith("warp") else tensor for name, tensor in point.items()}
            *_, end = WarpGrad(inner_lr=0.3, inner_steps=1, warp_params=algorithm.warp_params).trajectory(
                MetaParams(start, at.extra), task, problem.loss
            )
            total += float(problem.loss(end.params, task.query_set)[0])
        return total / len(points)

    gradient = problem.run("meta_gradient", theta, SHARD).total
    rng, length = np.random.default_rng(1), 1e-6
    for _ in range(4):
        direction = rng.standard_normal(theta.size) * is_warp
        direction /= np.linalg.norm(direction)
        numeric = objective(theta + length * direction) - objective(theta - length * direction)
        assert gradient @ direction == pytest.approx(numeric / (2 * length), rel=1e-6, abs=1e-8)


def test_a_linear_warp_layer_stands_behind_each_layer() -> None:
    torch.manual_seed(0)
    network = HeadedMLP(3, 3)
    problem, theta = problem_and_theta(WarpGrad(inner_steps=2, test_inner_steps=0), network)
    meta = split(problem.layout.unpack(theta))
    (task,) = problem.build(SHARD)
    x = task.query_set[0]
    with torch.no_grad():
        hidden = (nn.functional.linear(x, meta.model["body.0.weight"], meta.model["body.0.bias"])) @ meta.extra[
            "warp.body.0"
        ].T
        logits = nn.functional.linear(hidden.tanh(), meta.model["classifier.weight"], meta.model["classifier.bias"])
        logits = logits @ meta.extra["warp.classifier"].T
    adapted = problem.algorithm.adapt(meta, task, problem.loss)
    assert relative_error(problem.loss.predict(adapted, x), logits) < 1e-12
    assert list(adapted) == [name for name, _ in network.named_parameters()]


def test_the_learned_rule_is_a_gru_cell_of_each_coordinate() -> None:
    torch.manual_seed(0)
    algorithm = LearnedOptimizer(inner_lr=0.1, inner_steps=3, hidden=5)
    network = HeadedMLP(3, 3)
    problem, theta = problem_and_theta(algorithm, network)
    meta = split(problem.layout.unpack(theta))
    (task,) = problem.build(SHARD)
    cell = nn.GRUCell(2, 5).to(DOUBLE)
    with torch.no_grad():
        cell.weight_ih.copy_(meta.extra["rule.input"].T)
        cell.weight_hh.copy_(meta.extra["rule.recurrent"].T)
        cell.bias_ih.copy_(meta.extra["rule.bias"])
        cell.bias_hh.zero_()
    flat = torch.cat([meta.model[name].reshape(-1) for name, _ in network.named_parameters()])
    state = torch.zeros(len(flat), 5, dtype=DOUBLE)
    for _ in range(3):
        nn.utils.vector_to_parameters(flat, network.parameters())
        loss = cross_entropy(network(task.support_set[0]), task.support_set[1])[0]
        g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, list(network.parameters()))])
        large = g.abs() >= np.exp(-10)
        features = torch.where(
            large[:, None],
            torch.stack([g.abs().log() / 10, g.sign()], 1),
            torch.stack([-torch.ones_like(g), np.exp(10) * g], 1),
        )
        with torch.no_grad():
            state = cell(features, state)
            u, v = (state @ meta.extra["rule.output"] + meta.extra["rule.output_bias"]).T
            flat = flat - 0.1 * (u.exp() * g + v)
    adapted = algorithm.adapt(meta, task, problem.loss)
    ours = torch.cat([adapted[name].reshape(-1) for name, _ in network.named_parameters()])
    assert relative_error(ours, flat) < 1e-12


def test_features_of_small_and_of_no_gradients_have_derivatives() -> None:
    g = torch.tensor([0.0, 1e-30, -1e-6, 0.5, -3.0], dtype=DOUBLE, requires_grad=True)
    features = _features(g)
    assert features.abs().max() <= 1.001
    (slope,) = torch.autograd.grad(features.sum(), g)
    assert bool(slope.isfinite().all())
    assert features[0].tolist() == [-1, 0]
    assert features[4, 1] == -1


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_the_untrained_rule_is_gradient_descent(strategy: str) -> None:
    torch.manual_seed(0)
    network = HeadedMLP(3, 3).to(DOUBLE)
    totals = []
    for algorithm in (LearnedOptimizer(inner_lr=0.1, inner_steps=3, first_order=False), MAML(0.1, 3)):
        problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE), strategy=strategy)
        total = split(problem.layout.unpack(problem.run("meta_gradient", theta, SHARD).total))
        totals.append(join(MetaParams(total.model, {})))
    for name, tensor in totals[1].items():
        assert relative_error(totals[0][name], tensor) < 1e-12


@pytest.mark.parametrize(
    ("algorithm", "network", "message"),
    [
        (WarpGrad(warp_params=("warp.*",)), HeadedMLP(3, 3), r"algorithm.warp_params: 'warp.\*' matches no parameter"),
        (WarpGrad(warp_params=("*",)), HeadedMLP(3, 3), "algorithm.warp_params leaves no parameter for the inner loop"),
        (WarpGrad(), nn.LayerNorm(3), "puts a warp layer behind each layer .* and the model has none; name warp"),
    ],
)
def test_models_without_warp_layers_are_refused(algorithm: WarpGrad, network: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        problem_of(algorithm, network, Blobs())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (WarpGrad, {"inner_lr": -1.0}, "algorithm.inner_lr must be a number above 0"),
        (WarpGrad, {"inner_steps": 0}, "algorithm.inner_steps must be at least 1"),
        (LearnedOptimizer, {"hidden": 0}, "algorithm.hidden must be at least 1; given: 0"),
        (LearnedOptimizer, {"inner_optimizer": "adam"}, "has an update rule of its own, .*: leave out"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_the_outer_loop_teaches_the_rule_to_adapt_better() -> None:
    """The rule alone is trained; the initialisation stays what it is."""
    torch.manual_seed(0)
    algorithm = LearnedOptimizer(inner_lr=0.1, inner_steps=3)
    problem, theta = problem_of(algorithm, HeadedMLP(3, 3), Blobs(), strategy="vmap")
    params = {name: tensor.requires_grad_() for name, tensor in problem.layout.unpack(theta).items()}
    outer = torch.optim.Adam([tensor for name, tensor in params.items() if name.startswith("extra.")], lr=0.02)
    losses = []
    for step in range(40):
        result = problem.run("meta_gradient", problem.layout.pack(params), Shard("train", step, 0, 16))
        losses.append(result.metrics["loss"].mean())
        assert result.total is not None
        for name, g in problem.layout.unpack(result.total / 16).items():
            params[name].grad = g
        outer.step()
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])

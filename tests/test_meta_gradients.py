"""Meta-gradients against finite differences, closed forms and other implementations."""

from __future__ import annotations

import higher
import numpy as np
import pytest
import torch
from problems import Blobs, algorithms, problem_of, relative_error, small_models
from torch import nn

from distmeta import MAML, Episode, Reptile
from distmeta.algorithms.reptile import mini_batches
from distmeta.core.algorithm import Bilevel
from distmeta.core.inner import SGD, last, unroll
from distmeta.core.loss import ModuleLoss, cross_entropy, mse
from distmeta.core.params import split
from distmeta.core.seeds import stream
from distmeta.core.types import MetaParams
from distmeta.distributed.work import Shard

MODELS = ["mlp", "conv4-stride", "conv4-pool"]
DOUBLE = torch.float64


def double_problem(name: str, algorithm, **options):
    model, shape = small_models(DOUBLE)[name]
    return problem_of(algorithm, model, Blobs(shape, dtype=DOUBLE), **options)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_maml_is_the_gradient_of_the_query_loss_after_adaptation(name: str, steps: int, strategy: str) -> None:
    problem, theta = double_problem(name, MAML(inner_lr=0.1, inner_steps=steps), strategy=strategy)
    shard = Shard("train", 0, 0, 2)
    tasks = problem.build(shard)
    gradient = problem.run("meta_gradient", theta, shard).total

    def objective(vector: np.ndarray) -> float:
        params = split(problem.layout.unpack(vector)).model
        total = 0.0
        for task in tasks:
            adapted = last(unroll(problem.loss, params, task.support, SGD(0.1), steps)).params
            total += float(problem.loss(adapted, task.query(adapted))[0])
        return total

    # ReLU and max-pooling have kinks: directions short enough not to cross one, and central differences.
    rng, step = np.random.default_rng(0), 1e-6
    for _ in range(6):
        direction = rng.standard_normal(theta.size)
        direction /= np.linalg.norm(direction)
        numeric = (objective(theta + step * direction) - objective(theta - step * direction)) / (2 * step)
        assert gradient @ direction == pytest.approx(numeric, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_maml_equals_the_library_higher(name: str, first_order: bool) -> None:
    problem, theta = double_problem(name, MAML(inner_lr=0.1, inner_steps=2, first_order=first_order))
    shard = Shard("train", 3, 0, 2)
    ours = problem.run("meta_gradient", theta, shard).total

    model = problem.loss.module
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = np.zeros_like(theta)
    for task in problem.build(shard):
        with higher.innerloop_ctx(model, optimizer, track_higher_grads=not first_order) as (network, inner):
            for _ in range(2):
                inner.step(cross_entropy(network(task.support_set[0]), task.support_set[1])[0])
            query = cross_entropy(network(task.query_set[0]), task.query_set[1])[0]
            wrt = list(network.parameters()) if first_order else list(network.parameters(time=0))
            total += torch.cat([g.reshape(-1) for g in torch.autograd.grad(query, wrt)]).numpy()
    assert relative_error(ours, total) < 1e-10


def quadratic() -> tuple[ModuleLoss, Episode, torch.Tensor, torch.Tensor]:
    """L(theta; D) = ‖A theta − b‖²/m by a linear layer, whose Hessian is 2 AᵀA/m."""
    torch.manual_seed(3)
    layer = nn.Linear(4, 1, bias=False).to(DOUBLE)
    a, b, c, d = (torch.randn(6, n, dtype=DOUBLE) for n in (4, 1, 4, 1))
    return ModuleLoss(layer, mse), Episode((a, b), (c, d)), a, b


def test_maml_on_a_quadratic_has_its_closed_form() -> None:
    loss, task, a, b = quadratic()
    params, rate, steps = loss.init(), 0.05, 3
    theta = params["weight"].reshape(-1, 1)
    hessian = 2 * a.T @ a / 6
    contraction = torch.eye(4, dtype=DOUBLE) - rate * hessian
    adapted = theta
    for _ in range(steps):
        adapted = adapted - rate * 2 * a.T @ (a @ adapted - b) / 6
    query = 2 * task.query_set[0].T @ (task.query_set[0] @ adapted - task.query_set[1]) / 6
    closed = torch.linalg.matrix_power(contraction, steps) @ query

    for first_order, expected in ((False, closed), (True, query)):
        algorithm = MAML(inner_lr=rate, inner_steps=steps, first_order=first_order)
        result = algorithm.meta_gradient(MetaParams(params, {}), task, loss, step=0)
        assert relative_error(result.gradient.model["weight"].reshape(-1, 1), expected) < 1e-12


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_reptile_is_the_displacement_of_torch_optimizers(optimizer: str) -> None:
    model, shape = small_models(DOUBLE)["conv4-stride"]
    algorithm = Reptile(inner_optimizer=optimizer, inner_lr=0.01, inner_steps=5, batch_size=4)
    problem, theta = problem_of(algorithm, model, Blobs(shape, ways=3, shots=3, dtype=DOUBLE))
    shard = Shard("train", 0, 0, 1)
    ours = problem.run("meta_gradient", theta, shard).total

    (task,) = problem.build(shard)
    batches = mini_batches(task, 4)
    rule = (
        torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.999))
        if optimizer == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.01)
    )
    for k in range(5):
        x, y = batches({}, k)
        rule.zero_grad()
        cross_entropy(model(x), y)[0].backward()
        rule.step()
    moved = split(problem.layout.unpack(ours)).model
    before = split(problem.layout.unpack(theta)).model
    for name, parameter in model.named_parameters():
        assert relative_error(before[name] - moved[name], parameter.detach()) < 1e-9
    if optimizer == "adam":  # the second moment moves as well, and goes on from there
        moments = split(problem.layout.unpack(theta - ours)).extra
        for name, parameter in model.named_parameters():
            theirs = rule.state[parameter]["exp_avg_sq"] / (1 - 0.999**5)
            assert relative_error(moments[f"v.{name}"], theirs) < 1e-6


def test_reptile_goes_on_with_the_second_moment() -> None:
    """Two outer steps of one task, with ε = 1, are one long run of torch's Adam."""
    model, shape = small_models(DOUBLE)["mlp"]
    problem, theta = problem_of(Reptile(inner_lr=0.01, batch_size=None), model, Blobs(shape, dtype=DOUBLE))
    rule = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.999))
    vector = theta
    for step in range(2):
        shard = Shard("train", step, 0, 1)
        vector = vector - problem.run("meta_gradient", vector, shard).total
        (task,) = problem.build(shard)
        for _ in range(5):
            rule.zero_grad()
            cross_entropy(model(task.support_set[0]), task.support_set[1])[0].backward()
            rule.step()
    for name, tensor in split(problem.layout.unpack(vector)).model.items():
        assert relative_error(tensor, model.get_parameter(name).detach()) < 1e-9


def test_reptile_moves_theta_to_the_mean_of_the_adapted_weights() -> None:
    from distmeta.config import Outer
    from distmeta.distributed.executor import InProcess, MetaBatch, reduce_mean
    from distmeta.distributed.work import shards_of
    from distmeta.outer import OuterLoop

    model, shape = small_models(DOUBLE)["mlp"]
    problem, theta = problem_of(Reptile(inner_optimizer="sgd", inner_lr=0.1), model, Blobs(shape, dtype=DOUBLE))
    shards = shards_of("train", 0, 5, 2)
    results = InProcess(problem).map("meta_gradient", theta, shards)
    outer = OuterLoop(Outer(use="SGD", lr=0.25), problem.layout.unpack(theta), problem.layout)
    outer.update(reduce_mean(results), MetaBatch(InProcess(problem), theta, shards))

    adapted = []
    for shard in shards_of("train", 0, 5, 1):
        (task,) = problem.build(shard)
        meta = split(problem.layout.unpack(theta))
        steps = unroll(problem.loss, meta.model, mini_batches(task, 10), SGD(0.1), 5)
        adapted.append(problem.layout.pack({f"model.{k}": v for k, v in last(steps).params.items()}))
    assert relative_error(outer.vector(), theta + 0.25 * (np.mean(adapted, axis=0) - theta)) < 1e-12


def test_mini_batches_pass_through_the_whole_set_before_they_repeat() -> None:
    x = torch.arange(10.0)
    batches = mini_batches(Episode((x, x), (x, x)), 5)
    for epoch in range(3):
        seen = torch.cat([batches({}, 2 * epoch + half)[0] for half in (0, 1)])
        assert sorted(seen.tolist()) == x.tolist()
    assert not torch.equal(batches({}, 0)[0], batches({}, 2)[0])
    sizes = [len(mini_batches(Episode((x, x), (x, x)), size)({}, 1)[0]) for size in (3, 10, None)]
    assert sizes == [3, 10, 10]


@pytest.mark.parametrize("name", sorted(algorithms()))
class TestConformance:
    """What holds for every registered algorithm."""

    def test_vectorised_is_the_loop(self, name: str) -> None:
        for model in MODELS:
            looped, theta = double_problem(model, algorithms()[name])
            vectorised, _ = double_problem(model, algorithms()[name], strategy="vmap")
            shard = Shard("train", 0, 0, 3)
            one, other = (p.run("meta_gradient", theta, shard) for p in (looped, vectorised))
            # Adam divides by the gradient's size, which enlarges rounding where a gradient is nearly zero.
            assert relative_error(other.total, one.total) < (1e-6 if name == "reptile" else 1e-11)
            for metric, values in one.metrics.items():
                np.testing.assert_allclose(other.metrics[metric], values, rtol=1e-9)

    def test_a_task_is_the_same_wherever_it_stands(self, name: str) -> None:
        problem, theta = double_problem("mlp", algorithms()[name])
        whole = problem.run("meta_gradient", theta, Shard("train", 7, 0, 4))
        parts = [problem.run("meta_gradient", theta, Shard("train", 7, i, 1)) for i in (3, 1, 0, 2)]
        in_order = [parts[i] for i in (2, 1, 3, 0)]
        for metric, values in whole.metrics.items():
            assert np.array_equal(np.concatenate([part.metrics[metric] for part in in_order]), values)
        total = in_order[0].total.copy()
        for part in in_order[1:]:
            total += part.total
        assert np.array_equal(whole.total, total)

    def test_meta_gradient_leaves_no_trace(self, name: str) -> None:
        problem, theta = double_problem("conv4-stride", algorithms()[name])
        before = theta.copy()
        weights = [p.detach().clone() for p in problem.loss.module.parameters()]
        state = torch.random.get_rng_state()
        threads = torch.get_num_threads()
        first = problem.run("meta_gradient", theta, Shard("train", 0, 0, 2))
        again = problem.run("meta_gradient", theta, Shard("train", 0, 0, 2))
        assert np.array_equal(first.total, again.total)
        assert np.array_equal(theta, before)
        assert all(torch.equal(a, b) for a, b in zip(problem.loss.module.parameters(), weights, strict=True))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.get_num_threads() == threads

    def test_adaptation_lowers_the_support_loss(self, name: str) -> None:
        problem, theta = double_problem("mlp", algorithms()[name])
        (task,) = problem.build(Shard("test", 0, 0, 1))
        meta = split(problem.layout.unpack(theta))
        path = list(problem.algorithm.trajectory(meta, task, problem.loss))
        before, after = (float(problem.loss(step.params, task.support_set)[0]) for step in (path[0], path[-1]))
        assert len(path) > 1
        assert after < before


# They have tests of their own, as have those with no objective.
FIRST_ORDER = {"fomaml", "learned-optimizer", "maml-pp-annealed"}
DESCENDING = [n for n, a in sorted(algorithms().items()) if isinstance(a, Bilevel) and n not in FIRST_ORDER]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", DESCENDING)
def test_meta_gradient_is_that_of_its_objective(name: str, model: str) -> None:
    """Central differences in all meta-parameters of what a second-order algorithm says it descends."""
    algorithm = algorithms()[name]
    assert isinstance(algorithm, Bilevel)
    problem, theta = double_problem(model, algorithm)
    rng, length = np.random.default_rng(0), 1e-6
    theta = theta + 0.05 * rng.standard_normal(theta.size)  # away from where rates and curvatures start
    shard = Shard("train", 3, 0, 2)
    tasks = problem.build(shard)
    gradient = problem.run("meta_gradient", theta, shard).total

    def objective(vector: np.ndarray) -> float:
        meta = split({name: tensor.requires_grad_() for name, tensor in problem.layout.unpack(vector).items()})
        return sum(float(algorithm.objective(meta, task, problem.loss, step=3)[0].detach()) for task in tasks)

    parts = problem.layout.unpack(theta).items()
    is_extra = np.concatenate([np.full(t.numel(), name.startswith("extra.")) for name, t in parts])
    for mask in [np.ones_like(is_extra), is_extra] if is_extra.any() else [np.ones_like(is_extra)]:
        for _ in range(4):
            direction = rng.standard_normal(theta.size) * mask
            direction /= np.linalg.norm(direction)
            numeric = objective(theta + length * direction) - objective(theta - length * direction)
            assert gradient @ direction == pytest.approx(numeric / (2 * length), rel=1e-6, abs=2e-8)


def test_streams_are_named() -> None:
    names = [
        (0, "train", 0, 1),
        (0, "train", 1, 0),
        (1, "train", 0, 0),
        (0, "val", 0, 1),
        (0, "train", 10),
        (0, "t", "1"),
    ]
    draws = {float(stream(*name).random()) for name in names}
    assert len(draws) == len(names)
    assert stream(*names[0]).random() == stream(*names[0]).random()
    assert stream(1).random() != stream("1").random()

"""Each algorithm against the closed form, or the other implementation, of what its paper says."""

from __future__ import annotations

import higher
import numpy as np
import pytest
import torch
from problems import Blobs, HeadedMLP, problem_of, relative_error
from torch import nn

from distmeta import IMAML, MAML, R2D2, Episode, MAMLpp, MetaCurvature, MetaSGD, ProtoMAML
from distmeta.core.loss import ModuleLoss, cross_entropy, mse
from distmeta.core.params import join, split
from distmeta.core.types import MetaParams
from distmeta.distributed.work import Problem, Shard
from distmeta.errors import ConfigError, NumericalError
from distmeta.models import MLP, Conv4

DOUBLE = torch.float64


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return HeadedMLP(3, 3).to(DOUBLE)


def first_task(problem) -> Episode:
    (task,) = problem.build(Shard("train", 0, 0, 1))
    return task


@pytest.mark.parametrize(
    ("options", "moved"),
    [({"adapted_params": ("classifier.*",)}, "classifier"), ({"frozen_params": ("classifier.*",)}, "body")],
    ids=["anil", "boil"],
)
def test_anil_and_boil_equal_the_library_higher(options: dict, moved: str, network: nn.Module) -> None:
    """The oracle updates all parameters, those that are not to move at the rate 0."""
    problem, theta = problem_of(MAML(inner_lr=0.1, inner_steps=2, **options), network, Blobs(dtype=DOUBLE))
    shard = Shard("train", 0, 0, 1)
    ours = problem.run("meta_gradient", theta, shard).total
    task = first_task(problem)
    groups = [{"params": [p], "lr": 0.1 * name.startswith(moved)} for name, p in network.named_parameters()]
    with higher.innerloop_ctx(network, torch.optim.SGD(groups, lr=0.1)) as (copy, inner):
        for _ in range(2):
            inner.step(cross_entropy(copy(task.support_set[0]), task.support_set[1])[0])
        query = cross_entropy(copy(task.query_set[0]), task.query_set[1])[0]
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(query, list(copy.parameters(time=0)))])
    assert relative_error(ours, expected.numpy()) < 1e-10


def test_parameters_that_are_not_adapted_stay(network: nn.Module) -> None:
    problem, theta = problem_of(MAML(inner_lr=0.1, adapted_params=("*.weight",)), network, Blobs(dtype=DOUBLE))
    meta = split(problem.layout.unpack(theta))
    adapted = problem.algorithm.adapt(meta, first_task(problem), problem.loss)
    for name, tensor in meta.model.items():
        assert torch.equal(adapted[name], tensor) == name.endswith("bias")


def test_meta_sgd_rates_have_their_closed_form(network: nn.Module) -> None:
    """dL(theta − alpha ∘ g; Q)/dalpha = −g ∘ ∇L(theta_1; Q)."""
    problem, theta = problem_of(MetaSGD(inner_lr=0.1), network, Blobs(dtype=DOUBLE))
    total = problem.run("meta_gradient", theta, Shard("train", 0, 0, 1)).total
    rates = split(problem.layout.unpack(total)).extra
    task = first_task(problem)

    def gradient(data: tuple) -> list[torch.Tensor]:
        return list(torch.autograd.grad(cross_entropy(network(data[0]), data[1])[0], list(network.parameters())))

    support = gradient(task.support_set)
    with torch.no_grad():
        for parameter, g in zip(network.parameters(), support, strict=True):
            parameter.sub_(0.1 * g)
    for (name, _), g, q in zip(network.named_parameters(), support, gradient(task.query_set), strict=True):
        assert relative_error(rates[f"lr.{name}"], -g * q) < 1e-12


@pytest.mark.parametrize("kind", [MetaSGD, MetaCurvature, MAMLpp])
def test_what_starts_as_maml_has_its_gradient(kind: type, network: nn.Module) -> None:
    settings = {"inner_lr": 0.1, "inner_steps": 3}
    shard = Shard("train", 0, 0, 2)
    both = []
    for algorithm in (kind(**settings), MAML(**settings)):
        problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE))
        total = problem.run("meta_gradient", theta, shard).total
        both.append(join(MetaParams(split(problem.layout.unpack(total)).model, {})))
    for name, tensor in both[1].items():
        assert relative_error(both[0][name], tensor) < 1e-12


def test_curvature_is_a_kronecker_product() -> None:
    """On a linear layer: vec(M_o G M_iᵀ) = (M_o ⊗ M_i) vec(G), row by row."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).to(DOUBLE)
    algorithm = MetaCurvature(inner_lr=0.1)
    loss = ModuleLoss(layer, mse)
    meta = algorithm.init(loss.init())
    assert sorted(meta.extra) == ["mc0.weight", "mc1.weight"]
    factors = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in meta.extra.items()}
    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.randn(6, 3, dtype=DOUBLE)
    adapted = algorithm.adapt(MetaParams(meta.model, factors), Episode((x, y), (x, y)), loss)
    (g,) = torch.autograd.grad(mse(layer(x), y)[0], [layer.weight])
    turned = torch.kron(factors["mc0.weight"], factors["mc1.weight"]) @ g.reshape(-1)
    assert relative_error(adapted["weight"], (layer.weight - 0.1 * turned.reshape(3, 4)).detach()) < 1e-12


def test_multi_step_weights_fade_into_the_last_step() -> None:
    algorithm = MAMLpp(inner_steps=4, multi_step_until=10)
    assert algorithm.weights(0) == [0.25] * 4
    assert algorithm.weights(5) == [0.125, 0.125, 0.125, 0.625]
    assert algorithm.weights(10) == algorithm.weights(99) == [0, 0, 0, 1]
    assert MAMLpp(inner_steps=2).weights(0) == [0, 1]


def test_multi_step_loss_is_the_weighted_sum(network: nn.Module) -> None:
    algorithm = MAMLpp(inner_lr=0.1, inner_steps=3, multi_step_until=10)
    problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE))
    task, meta = first_task(problem), split(problem.layout.unpack(theta))
    losses = [
        float(problem.loss(at.params, task.query_set)[0]) for at in algorithm.trajectory(meta, task, problem.loss)
    ]
    measured = problem.run("meta_gradient", theta, Shard("train", 4, 0, 1), [task]).metrics["loss"][0]
    assert measured == pytest.approx(np.dot(algorithm.weights(4), losses[1:]), rel=1e-12)


def test_annealed_order_begins_as_first_order(network: nn.Module) -> None:
    shard = Shard("train", 1, 0, 1)

    def gradient(**options: object) -> np.ndarray:
        algorithm = MAMLpp(inner_lr=0.1, inner_steps=2, **options)
        problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE))
        return problem.run("meta_gradient", theta, shard).total

    assert np.array_equal(gradient(first_order_until=2), gradient(first_order=True))
    assert np.array_equal(gradient(first_order_until=1), gradient())
    assert not np.array_equal(gradient(), gradient(first_order=True))


def test_rates_of_the_last_step_serve_the_steps_beyond(network: nn.Module) -> None:
    problem, theta = problem_of(MAMLpp(inner_lr=0.1, inner_steps=2, test_inner_steps=4), network, Blobs(dtype=DOUBLE))
    longer = list(problem.algorithm.trajectory(split(problem.layout.unpack(theta)), first_task(problem), problem.loss))
    maml = MAML(inner_lr=0.1, inner_steps=4)
    steps = list(maml.trajectory(MetaParams(problem.loss.init(), {}), first_task(problem), problem.loss))
    assert len(longer) == 5
    for name, tensor in steps[-1].params.items():
        assert relative_error(longer[-1].params[name], tensor) < 1e-12


def test_prototypes_classify_by_the_nearest_mean(network: HeadedMLP) -> None:
    problem, theta = problem_of(ProtoMAML(inner_steps=0), network, Blobs(shots=3, dtype=DOUBLE))
    task = first_task(problem)
    adapted = problem.algorithm.adapt(split(problem.layout.unpack(theta)), task, problem.loss)
    with torch.no_grad():
        logits = problem.loss.predict(adapted, task.query_set[0])
        support, query = network.body(task.support_set[0]), network.body(task.query_set[0])
        prototypes = torch.stack([support[task.support_set[1] == n].mean(0) for n in range(3)])
        expected = (-torch.cdist(query, prototypes).square()).softmax(1)
    assert relative_error(logits.softmax(1), expected) < 1e-12


def test_prototypes_of_fewer_classes_than_outputs(network: HeadedMLP) -> None:
    problem, theta = problem_of(ProtoMAML(inner_lr=0.1, inner_steps=2), network, Blobs(shots=3, dtype=DOUBLE))
    (x, y), (query_x, query_y) = first_task(problem)
    known = Episode((x[y < 2], y[y < 2]), (query_x[query_y < 2], query_y[query_y < 2]))
    adapted = problem.algorithm.adapt(split(problem.layout.unpack(theta)), known, problem.loss)
    probability = problem.loss.predict(adapted, known.query_set[0]).softmax(1)
    assert bool(probability.isfinite().all())
    assert float(probability[:, 2].max()) < 1e-12, "a class without examples is never the answer"


def test_ridge_head_minimises_the_regularised_squared_error(network: HeadedMLP) -> None:
    """‖X W − Y‖² + lambda ‖W‖² by least squares on the rows of X and of sqrt(lambda) I."""
    problem, theta = problem_of(R2D2(ridge=0.3, scale=2.0), network, Blobs(shots=3, dtype=DOUBLE))
    task = first_task(problem)
    adapted = problem.algorithm.adapt(split(problem.layout.unpack(theta)), task, problem.loss)
    with torch.no_grad():
        x = network.body(task.support_set[0])
    y = nn.functional.one_hot(task.support_set[1], 3).to(DOUBLE)
    rows = torch.cat([x, 0.3**0.5 * torch.eye(x.shape[1], dtype=DOUBLE)])
    solution = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(x.shape[1], 3, dtype=DOUBLE)])).solution
    assert relative_error(adapted["classifier.weight"], 2 * solution.T) < 1e-10
    assert torch.equal(adapted["classifier.bias"], torch.zeros(3, dtype=DOUBLE))


def linear_regression() -> tuple[ModuleLoss, Episode, torch.Tensor]:
    """A quadratic support loss, and its Hessian 2 AᵀA/m."""
    torch.manual_seed(3)
    layer = nn.Linear(4, 1, bias=False).to(DOUBLE)
    a, b, c, d = (torch.randn(6, n, dtype=DOUBLE) for n in (4, 1, 4, 1))
    return ModuleLoss(layer, mse), Episode((a, b), (c, d)), 2 * a.T @ a / 6


@pytest.mark.parametrize("damping", [0.0, 1.5])
def test_imaml_on_a_quadratic_has_its_closed_form(damping: float) -> None:
    """phi = (H + lambda I)⁻¹ (2 Aᵀb/m + lambda theta), gradient = (I + H / (lambda + damping))⁻¹ ∇L(phi; Q)."""
    loss, task, hessian = linear_regression()
    params, strength = loss.init(), 0.7
    (a, b), (c, d) = task
    system = hessian + strength * torch.eye(4, dtype=DOUBLE)
    phi = torch.linalg.solve(system, 2 * a.T @ b / 6 + strength * params["weight"].T)
    query = 2 * c.T @ (c @ phi - d) / 6
    algorithm = IMAML(inner_lr=0.1, inner_steps=600, regularization=strength, cg_steps=4, cg_damping=damping)
    result = algorithm.meta_gradient(MetaParams(params, {}), task, loss, step=0)
    assert relative_error(algorithm.adapt(MetaParams(params, {}), task, loss)["weight"].T, phi) < 1e-12
    expected = torch.linalg.solve(torch.eye(4, dtype=DOUBLE) + hessian / (strength + damping), query)
    assert relative_error(result.gradient.model["weight"].T, expected) < 1e-9
    assert float(result.metrics["cg_residual"]) < 1e-9
    assert algorithm.complaint({"cg_residual": float(result.metrics["cg_residual"])}) is None


def test_imaml_is_the_gradient_through_a_converged_inner_loop(network: nn.Module) -> None:
    """Unrolled differentiation of the same inner loop, run until it stands still, is the oracle."""
    settings = {"inner_lr": 0.2, "inner_steps": 300, "regularization": 2.0}
    problem, theta = problem_of(IMAML(**settings, cg_steps=40), network, Blobs(dtype=DOUBLE))
    ours = problem.run("meta_gradient", theta, Shard("train", 0, 0, 1)).total
    task = first_task(problem)
    start = {name: tensor.requires_grad_() for name, tensor in problem.loss.init().items()}
    params = start
    for _ in range(300):
        value = problem.loss(params, task.support_set)[0]
        value = value + sum((params[name] - start[name]).square().sum() for name in start)
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=True)
        params = {name: t - 0.2 * g for (name, t), g in zip(params.items(), gradients, strict=True)}
    query = problem.loss(params, task.query_set)[0]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(query, list(start.values()))])
    assert relative_error(ours, expected.numpy()) < 1e-8


def test_conjugate_gradients_that_diverge_are_named(network: nn.Module) -> None:
    algorithm = IMAML(inner_lr=0.1, regularization=1e-3, cg_steps=2)
    problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE))
    with pytest.raises(NumericalError, match=r"^task \d of step \d+ .*: conjugate gradients did not converge .*raise"):
        for step in range(20):
            problem.run("meta_gradient", 3 * theta, Shard("train", step, 0, 4))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            MAML(adapted_params=("head.*",)),
            r"algorithm.adapted_params: 'head.\*' matches no parameter .* layers.1.weight",
        ),
        (MAML(frozen_params=("*",)), "leave no parameter for the inner loop to move"),
        (ProtoMAML(), "algorithm.head: the model has no trainable linear layer with bias called 'classifier'"),
        (R2D2(head="layers"), "algorithm.head: the model has no trainable linear layer with bias called 'layers'"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(algorithm, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        problem_of(algorithm, MLP((3,), 3, (8,)), Blobs())


@pytest.mark.parametrize("algorithm", [ProtoMAML(inner_steps=0), R2D2()])
def test_heads_from_the_support_set_need_class_labels(algorithm, network: nn.Module) -> None:
    problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE), loss=mse)
    (x, _), _ = task = first_task(problem)
    regression = Episode((x, x), task.query_set)
    with pytest.raises(
        ConfigError, match=r"needs class labels as targets; the tasks give torch.float64 of shape \(6, 3"
    ):
        problem.run("meta_gradient", theta, Shard("train", 0, 0, 1), [regression])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (IMAML, {"regularization": 0.0}, "algorithm.regularization"),
        (IMAML, {"cg_steps": 0}, "algorithm.cg_steps"),
        (IMAML, {"cg_damping": -1.0}, "algorithm.cg_damping"),
        (R2D2, {"ridge": 0.0}, "algorithm.ridge"),
        (R2D2, {"scale": -1.0}, "algorithm.scale"),
        (ProtoMAML, {"inner_steps": -1}, "algorithm.inner_steps"),
        (MAMLpp, {"multi_step_until": -1}, "algorithm.multi_step_until"),
        (MAMLpp, {"inner_steps": 0}, "algorithm.inner_steps"),
        (MetaSGD, {"inner_lr": 0.0}, "algorithm.inner_lr"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def normalised(algorithm: MAML, **options) -> tuple[Problem, np.ndarray]:
    """On a network with batch-norm, in double precision."""
    torch.manual_seed(0)
    network = Conv4((1, 16, 16), 3, filters=4).to(DOUBLE)
    return problem_of(algorithm, network, Blobs((1, 16, 16), dtype=DOUBLE), **options)


NORM = ("features.*.norm.*",)


def test_equal_normalisation_in_all_steps_is_that_of_maml() -> None:
    """The gradients of the steps' weights and biases add up to that of one for all, and nothing else changes."""
    settings = {"inner_lr": 0.1, "inner_steps": 3}
    shard = Shard("train", 0, 0, 2)
    problem, theta = normalised(MAMLpp(**settings, learn_rates=False, per_step_norm=True))
    ours = split(problem.layout.unpack(problem.run("meta_gradient", theta, shard).total))
    problem, theta = normalised(MAML(**settings, frozen_params=NORM))
    for name, tensor in split(problem.layout.unpack(problem.run("meta_gradient", theta, shard).total)).model.items():
        rows = ours.extra.get(f"norm.{name}")
        assert (rows is not None) == (".norm." in name)
        assert relative_error(ours.model[name] if rows is None else rows.sum(0), tensor) < 1e-10, name
        if rows is not None:
            assert rows.shape == (3, 4)
            assert not torch.equal(rows[0], rows[1])
            assert not ours.model[name].any()


def test_normalisation_of_no_step_is_that_of_the_first() -> None:
    problem, theta = normalised(MAMLpp(inner_lr=0.1, test_inner_steps=0, per_step_norm=True))
    theta = theta + 0.05 * np.random.default_rng(0).standard_normal(theta.size)
    meta = split(problem.layout.unpack(theta))
    (task,) = problem.build(Shard("val", 0, 0, 1))
    (start,) = problem.algorithm.trajectory(meta, task, problem.loss)
    for name, rows in meta.extra.items():
        if name.startswith("norm."):
            assert torch.equal(start.params[name[5:]], rows[0])
    assert np.isfinite(problem.run("evaluate", theta, Shard("val", 0, 0, 1)).metrics["loss"]).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_each_step_has_its_own_normalisation(strategy: str, recompute: bool) -> None:
    """Written out: step k and the query after it see row k, steps beyond K the last row."""
    algorithm = MAMLpp(
        inner_lr=0.1, inner_steps=2, test_inner_steps=3, per_step_norm=True, multi_step_until=10, recompute=recompute
    )
    problem, theta = normalised(algorithm, strategy=strategy)
    theta = theta + 0.05 * np.random.default_rng(0).standard_normal(theta.size)
    shard = Shard("train", 5, 0, 1)
    ours = problem.layout.unpack(problem.run("meta_gradient", theta, shard).total)
    (task,) = problem.build(shard)
    joined = {name: tensor.requires_grad_() for name, tensor in problem.layout.unpack(theta).items()}
    meta = split(joined)
    moving = [name for name in meta.model if f"norm.{name}" not in meta.extra]
    params, queries = dict(meta.model), []
    for k in (0, 1, 1):
        params |= {name[5:]: rows[k] for name, rows in meta.extra.items() if name.startswith("norm.")}
        rates = [meta.extra[f"lr.{name}"][k] for name in moving]
        support = problem.loss(params, task.support_set)[0]
        gradients = torch.autograd.grad(support, [params[name] for name in moving], create_graph=True)
        params |= {n: params[n] - a * g for n, a, g in zip(moving, rates, gradients, strict=True)}
        queries.append(problem.loss(params, task.query_set)[0])
    weighted = sum(v * query for v, query in zip(algorithm.weights(5), queries[:2], strict=True))
    expected = torch.autograd.grad(weighted, list(joined.values()), materialize_grads=True)
    for (name, tensor), g in zip(ours.items(), expected, strict=True):
        torch.testing.assert_close(tensor, g, rtol=1e-8, atol=1e-10, msg=name)
    adapted = problem.algorithm.adapt(meta, task, problem.loss)
    for name, tensor in params.items():
        torch.testing.assert_close(adapted[name], tensor.detach(), rtol=1e-10, atol=1e-12)


def test_normalisation_by_step_needs_layers_of_normalisation(network: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"algorithm.per_step_norm: the model has no layer of normalisation .* body"):
        problem_of(MAMLpp(per_step_norm=True), network, Blobs())

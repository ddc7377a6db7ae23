"""Networks whose products are rounded to bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import Blobs, HeadedMLP, algorithms, problem_of, relative_error, small_models

import distmeta
from distmeta.config import load
from distmeta.core.loss import ModuleLoss, cross_entropy
from distmeta.distributed.work import Shard
from distmeta.errors import ConfigError
from distmeta.experiment import assemble

SMOOTH = sorted(set(algorithms()) - {"learned-optimizer", "learned-optimizer-2"})  # these see signs, which may turn


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("name", SMOOTH)
def test_meta_gradients_are_near_those_of_single_precision(name: str, strategy: str) -> None:
    """Rounding to 8 bits moves each factor by up to 2^-9 of itself; what those on the way to a gradient add up to is
    some hundredths. CAVIA with film multiplies layers by context parameters, and is farther off."""
    torch.manual_seed(0)
    network = HeadedMLP(3, 3)
    found = {}
    for precision in ("float32", "bfloat16"):
        problem, theta = problem_of(algorithms()[name], network, Blobs(), strategy=strategy, precision=precision)
        result = problem.run("meta_gradient", theta, Shard("train", 0, 0, 4))
        assert result.total is not None and result.total.dtype == np.float32
        found[precision] = result.total
    assert 1e-5 < relative_error(found["bfloat16"], found["float32"]) < (0.2 if name == "cavia-film" else 0.05)


def test_the_loss_and_its_gradients_are_of_single_precision() -> None:
    model, (channels, *sides) = small_models(torch.float32)["conv4-pool"]
    loss = ModuleLoss(model, cross_entropy, "bfloat16")
    params = {name: tensor.requires_grad_() for name, tensor in loss.init().items()}
    x, y = torch.rand(6, channels, *sides), torch.arange(6) % 3
    output = loss.predict(params, x)
    exact = ModuleLoss(model, cross_entropy).predict(params, x)
    assert output.dtype == torch.float32 and not torch.equal(output, exact)
    assert torch.allclose(output, exact, rtol=0.02, atol=0.02)  # the fused convolutions are not rounded, the head is
    value, metrics = loss(params, (x, y))
    gradients = torch.autograd.grad(value, list(params.values()), create_graph=True)
    assert {value.dtype, metrics["accuracy"].dtype, *(g.dtype for g in gradients)} == {torch.float32}
    torch.autograd.grad(sum(g.square().sum() for g in gradients), list(params.values()))


def test_evaluation_and_further_classes_are_rounded_too(tmp_path) -> None:
    """A head of more classes than in training is made for a network of the same precision."""
    settings = ["scaling.num_workers=0", "model.filters=4", "evaluation.tasks=0", "validation.every=0"]
    run = distmeta.train(
        "glyphs-mixed-ways-protomaml", *settings, "train.steps=1", "train.precision=bfloat16", f"run_dir={tmp_path}/run"
    )
    assert 0 < distmeta.evaluate(run.path, "tasks.ways=25", "tasks.shots=1", episodes=2)["after"]["mean"] <= 1
    experiment = assemble(load("glyphs-mixed-ways-protomaml", ["tasks.ways=25", "train.precision=bfloat16"]))
    assert experiment.problem.loss.precision == "bfloat16"


def test_policies_are_not_rounded() -> None:
    with pytest.raises(ConfigError, match=r"train.precision=bfloat16 is for networks of supervised tasks"):
        assemble(load("navigation-maml-trpo", ["train.precision=bfloat16"]))


def test_a_layer_that_cannot_be_rounded_and_vectorised_is_refused_at_the_start(tmp_path) -> None:
    """On a CPU torch's own batch-norm takes no mixed types under vmap; one task after the other it does."""
    norm = torch.nn.BatchNorm1d(4, track_running_stats=False)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), norm, torch.nn.Linear(4, 3))
    parts = {"model": model, "tasks": Blobs(), "algorithm": distmeta.MAML(inner_lr=0.1)}
    settings = ["scaling.num_workers=0", "train.steps=1", "validation.every=0", "evaluation.tasks=0"]
    settings += ["train.precision=bfloat16", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(
        ConfigError, match=r"cannot be vectorised in bfloat16 \(RuntimeError: .*set train.strategy=loop"
    ):
        distmeta.train(None, *settings, "train.strategy=vmap", **parts)
    assert distmeta.train(None, *settings, "train.strategy=loop", **parts).summary()["steps"] == 1

"""Context parameters against networks that have them written into their forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Blobs, HeadedMLP, problem_of, relative_error
from torch import Tensor, nn

import distmeta
from distmeta import CAVIA
from distmeta.core.loss import cross_entropy
from distmeta.core.params import split
from distmeta.distributed.work import Shard
from distmeta.errors import ConfigError

DOUBLE = torch.float64
SHARD = Shard("train", 0, 0, 1)


def own_meta_gradient(logits, learned: dict[str, Tensor], numbers: int, task, *, lr: float, steps: int) -> list[Tensor]:
    """CAVIA as its paper writes it: ``logits(x, phi)`` with phi from 0, by autograd."""
    phi = torch.zeros(numbers, dtype=DOUBLE, requires_grad=True)
    for _ in range(steps):
        value = cross_entropy(logits(task.support_set[0], phi), task.support_set[1])[0]
        phi = phi - lr * torch.autograd.grad(value, phi, create_graph=True)[0]
    value = cross_entropy(logits(task.query_set[0], phi), task.query_set[1])[0]
    return list(torch.autograd.grad(value, list(learned.values())))


def test_a_shift_is_the_context_concatenated_to_the_inputs() -> None:
    torch.manual_seed(0)
    network = HeadedMLP(3, 3).to(DOUBLE)
    problem, theta = problem_of(CAVIA(inner_lr=0.5, inner_steps=3, context=4), network, Blobs(dtype=DOUBLE))
    ours = problem.layout.unpack(problem.run("meta_gradient", theta, SHARD).total)
    learned = {name: tensor.requires_grad_() for name, tensor in problem.layout.unpack(theta).items()}
    (task,) = problem.build(SHARD)

    def logits(x: Tensor, phi: Tensor) -> Tensor:
        wide = torch.cat([learned["model.body.0.weight"], learned["extra.shift.body.0"]], 1)
        inputs = torch.cat([x, phi.expand(len(x), -1)], 1)
        hidden = F.linear(inputs, wide, learned["model.body.0.bias"]).tanh()
        return F.linear(hidden, learned["model.classifier.weight"], learned["model.classifier.bias"])

    assert learned["extra.shift.body.0"].shape == (8, 4)
    for (name, _), g in zip(learned.items(), own_meta_gradient(logits, learned, 4, task, lr=0.5, steps=3), strict=True):
        assert relative_error(ours[name], g) < 1e-11, name


@pytest.mark.parametrize("layer", ["0", "1", "4"])
def test_film_scales_and_shifts_what_the_layer_puts_out(layer: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 49, 3)).to(DOUBLE)
    algorithm = CAVIA(inner_lr=0.5, inner_steps=2, context=6, layers=(layer,), film=True)
    problem, theta = problem_of(algorithm, network, Blobs((1, 16, 16), dtype=DOUBLE))
    ours = problem.layout.unpack(problem.run("meta_gradient", theta, SHARD).total)
    joined = {name: tensor.requires_grad_() for name, tensor in problem.layout.unpack(theta).items()}
    meta = split(joined)
    (task,) = problem.build(SHARD)

    def logits(x: Tensor, phi: Tensor) -> Tensor:
        def film(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
            shape = (-1, *[1] * (output.ndim - 2))
            gain = 1 + meta.extra[f"scale.{layer}"] @ phi
            return gain.reshape(shape) * output + (meta.extra[f"shift.{layer}"] @ phi).reshape(shape)

        handle = network.get_submodule(layer).register_forward_hook(film)
        output = torch.func.functional_call(network, meta.model, (x,))
        handle.remove()
        return output

    gradients = own_meta_gradient(logits, joined, 6, task, lr=0.5, steps=2)
    for (name, _), g in zip(joined.items(), gradients, strict=True):  # a bias before batch-norm has none
        torch.testing.assert_close(ours[name], g, rtol=1e-9, atol=1e-13, msg=name)


def test_what_is_adapted_is_an_ordinary_module(tmp_path) -> None:
    """Of a layer's weight and bias alone, and the run comes back from its folder."""
    parts = {
        "model": HeadedMLP(3, 3),
        "tasks": Blobs(),
        "algorithm": CAVIA(inner_steps=2, layers=("class*",), film=True),
        "loss": cross_entropy,
    }
    settings = {"train": {"steps": 2}, "scaling": {"num_workers": 0}, "run_dir": str(tmp_path / "run")}
    run = distmeta.train(settings, "evaluation.tasks=2", "validation.every=0", **parts)
    (x, y), _ = Blobs().sample(np.random.default_rng(0), "test")
    adapted = distmeta.adapt(run, (x, y), checkpoint="last", **parts).module.state_dict()
    other = distmeta.adapt(run, (x + 1, y), checkpoint="last", **parts).module.state_dict()
    assert list(adapted) == list(HeadedMLP(3, 3).state_dict())
    differ = {name for name, tensor in adapted.items() if not torch.equal(tensor, other[name])}
    assert differ == {"classifier.weight", "classifier.bias"}


def test_the_run_s_seed_draws_the_matrices(tmp_path) -> None:
    from distmeta.config import load
    from distmeta.experiment import assemble

    settings = ["algorithm.use=cavia", "scaling.num_workers=0"]
    drawn = [assemble(load("sinusoid-maml", [*settings, f"seed={seed}"])).initial for seed in (1, 1, 2)]
    one, same, other = (initial["extra.shift.layers.1"] for initial in drawn)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (CAVIA(layers=("features.*",)), r"algorithm.layers: 'features.\*' matches no layer .*; they are body.0, class"),
        (CAVIA(), "has none with both; its parameters are weight"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(algorithm: CAVIA, message: str) -> None:
    network = HeadedMLP(3, 3) if algorithm.layers else nn.Linear(3, 3, bias=False)
    with pytest.raises(ConfigError, match=message):
        problem_of(algorithm, network, Blobs())


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.context must be at least 1; given: 0"):
        CAVIA(context=0)

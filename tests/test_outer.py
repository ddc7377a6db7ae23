"""The outer loop's optimizer and schedule: their settings, and their state, which survives being saved as JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from distmeta.config import Outer, validate
from distmeta.core.params import Layout
from distmeta.errors import ConfigError
from distmeta.outer import OuterLoop

SCHEDULES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4, 4, 6]},
    "ConstantLR": {"total_iters": 5},
    "LinearLR": {"total_iters": 5},
    "ExponentialLR": {"gamma": 0.8},
    "PolynomialLR": {"total_iters": 6},
    "CosineAnnealingLR": {"T_max": 7},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 8},
}
OPTIMIZERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "RMSprop", "Rprop"]


def loop(dtype: torch.dtype = torch.float32, **settings: Any) -> OuterLoop:
    params = {"model.w": torch.linspace(-1, 1, 6, dtype=dtype)}
    return OuterLoop(Outer.model_validate(settings), params, Layout.of(params))


def advance(outer: OuterLoop, steps: range) -> list[float]:
    rates = []
    for step in steps:
        gradient = np.random.default_rng(step).standard_normal(6).astype(outer.vector().dtype)
        rates.append(outer.update(gradient, None)["lr"])  # type: ignore[arg-type]
    return rates


def saved_and_restored(outer: OuterLoop, other: OuterLoop) -> OuterLoop:
    tensors, plain = outer.state()
    params = {name: parameter.detach().clone() for name, parameter in outer.params.items()}
    other.restore(params, {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(plain)))
    return other


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_as_if_it_had_not_been_saved(name: str) -> None:
    momentum = {"options": {"momentum": 0.9}} if name in ("CyclicLR", "OneCycleLR") else {}
    settings = {"use": "SGD", "lr": 0.1, "schedule": {"use": name, **SCHEDULES[name]}} | momentum
    straight, first = loop(**settings), loop(**settings)
    rates = advance(straight, range(8))
    assert len(set(rates)) > 1
    again = advance(first, range(3)) + advance(saved_and_restored(first, loop(**settings)), range(3, 8))
    assert again == rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_to_the_bit(name: str, dtype: torch.dtype) -> None:
    settings = {"use": name, "lr": 0.01, "options": {"momentum": 0.9} if name == "SGD" else {}}
    straight, first = loop(dtype, **settings), loop(dtype, **settings)
    advance(straight, range(6))
    advance(first, range(3))
    resumed = saved_and_restored(first, loop(dtype, **settings))
    advance(resumed, range(3, 6))
    assert resumed.vector().tobytes() == straight.vector().tobytes()


def test_weight_decay_is_what_is_set_and_else_the_optimizers_own() -> None:
    decay = lambda **settings: loop(use="AdamW", **settings).optimizer.param_groups[0]["weight_decay"]  # noqa: E731
    assert (decay(), decay(weight_decay=0.0), decay(weight_decay=0.1)) == (0.01, 0.0, 0.1)
    assert loop(use="Rprop").optimizer.param_groups[0].get("weight_decay") is None, "it has none"


def test_a_state_of_other_settings_keeps_its_moments_and_takes_the_rates_at_hand() -> None:
    before = loop(lr=0.01)
    advance(before, range(3))
    faster = saved_and_restored(before, loop(lr=0.5))
    assert faster.lr == 0.5 and faster.step == 3 and faster.optimizer.state_dict()["state"]
    other = saved_and_restored(before, loop(lr=0.5, options={"betas": [0.5, 0.9]}))
    assert other.lr == 0.5 and not any(other.optimizer.state.values())


def test_stale_gradients_are_those_of_one_step_before() -> None:
    """On a quadratic, with momentum, against the recursion written out; and through a checkpoint."""
    minimum, lr, momentum = np.linspace(0, 1, 6), 0.1, 0.5
    theta, velocity = [np.linspace(-1, 1, 6)], np.zeros(6)
    for step in range(8):
        velocity = momentum * velocity + (theta[max(step - 1, 0)] - minimum)
        theta.append(theta[-1] - lr * velocity)
    settings = {"use": "SGD", "lr": lr, "options": {"momentum": momentum}, "stale": True}
    outer = loop(torch.float64, **settings)
    for step in range(8):
        assert np.allclose(outer.taken_at(), theta[max(step - 1, 0)], rtol=1e-12)
        assert np.allclose(outer.vector(), theta[step], rtol=1e-12)
        outer.update(outer.taken_at() - minimum, None)  # type: ignore[arg-type]
        outer = saved_and_restored(outer, loop(torch.float64, **settings))
    exact = saved_and_restored(outer, loop(torch.float64, **(settings | {"stale": False})))
    assert np.array_equal(exact.taken_at(), exact.vector()) and "previous" not in exact.state()[0]


@pytest.mark.parametrize("more", [{"passes": 2}, {"trust_region": {}, "use": "SGD", "lr": 1}])
def test_stale_gradients_do_not_go_with_further_passes(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"outer\.stale takes one meta-gradient a step"):
        validate({"outer": {"stale": True, **more}})


@pytest.mark.parametrize(("stale", "edge"), [(False, 2.0), (True, 1.0)])
def test_stale_gradients_bear_half_the_rate_on_a_quadratic(stale: bool, edge: float) -> None:
    """theta_t+1 = theta_t − lr · lambda · theta_t−1: z² − z + lr · lambda has its roots within the circle below 1."""
    for rate, bears in ((0.95 * edge, True), (1.05 * edge, False)):
        outer = loop(torch.float64, use="SGD", lr=rate, stale=stale)
        for _ in range(200):
            outer.update(outer.taken_at(), None)  # type: ignore[arg-type]
        assert (np.abs(outer.vector()).max() < 1) == bears

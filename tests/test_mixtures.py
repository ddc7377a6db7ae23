"""Mixtures of task distributions: drawing, weights, parts that fit one model, and images of one form."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from problems import Blobs
from test_tasks import Numbered

import distmeta
from distmeta import Mixture, TaskSpec
from distmeta.config import load
from distmeta.core.seeds import stream
from distmeta.errors import ConfigError
from distmeta.experiment import assemble, complete
from distmeta.explain import explain_config
from distmeta.tasks.functions import SimpleFunction
from distmeta.tasks.glyphs import Glyphs
from distmeta.tasks.navigation import Navigation
from distmeta.tasks.sinusoid import Sinusoid

SHAPE = (1, 28, 28)


def test_a_task_of_a_mixture_is_one_of_its_part_and_a_function_of_its_stream_alone() -> None:
    parts = {"waves": Sinusoid(), "lines": SimpleFunction(family="line"), "never": SimpleFunction(family="tanh")}
    mixture = Mixture(parts, weights={"waves": 3, "never": 0})
    assert mixture.spec == TaskSpec((1,), 1, "mse")
    drawn = Counter()
    for index in range(2000):
        (part,) = mixture.groups_of(stream(0, index), "train")
        drawn[part] += 1
        if index < 50:
            task, again = (mixture.sample(stream(0, index), "train") for _ in range(2))
            assert torch.equal(task.query_set[1], again.query_set[1])
            (x, y), line = task.query_set, np.polyfit
            residual = line(x.flatten().numpy(), y.flatten().numpy(), 1, full=True)[1].sum()
            assert (residual < 1e-6) == (part == "lines")
    assert drawn["never"] == 0
    assert drawn["waves"] / 2000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 2000) ** 0.5)


@pytest.mark.parametrize("family", ["line", "parabola", "tanh", "absolute"])
def test_simple_functions_are_what_they_say(family: str) -> None:
    """Each is linear in its coefficients once its centre is known: least squares over a grid of centres finds them."""
    basis = {
        "line": lambda x, c: x,
        "parabola": lambda x, c: (x - c) ** 2,
        "tanh": lambda x, c: np.tanh(x - c),
        "absolute": lambda x, c: np.abs(x - c),
    }[family]
    for index in range(20):
        x, y = (
            t.double().numpy().flatten() for t in SimpleFunction(family=family).sample(stream(index), "val").query_set
        )
        assert abs(x).max() <= 5 and len(x) == 100
        left = []
        for c in np.linspace(-3, 3, 601):
            design = np.stack([basis(x, c), np.ones_like(x)], 1)
            (a, b), *_ = np.linalg.lstsq(design, y, rcond=None)
            left.append((np.abs(design @ (a, b) - y).max(), abs(a), abs(b)))
        error, a, b = min(left)
        assert error < 0.05 and b <= 3.05
        assert 0.019 <= a <= 0.151 if family == "parabola" else a <= 3.05


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "tasks.of is empty"),
        ({"a": Sinusoid(), "b": Navigation()}, "tasks.of.b is Navigation; the parts of a mixture are"),
        ({"a": Sinusoid(), "b": 3}, "tasks.of.b is int"),
        ({"a": Sinusoid(), "b": Numbered()}, r"a has inputs of shape \(1,\) and b of \(1, 4, 4\): make them equal"),
        ({"a": Glyphs(), "b": Numbered()}, r"a has inputs of shape \(1, 28, 28\) and b of .*set tasks.each.image_size"),
        ({"a": Sinusoid(), "b": Blobs((1,), 3)}, "a has the loss mse and b cross_entropy"),
    ],
)
def test_parts_that_fit_no_one_model_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = Mixture(parts).spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"wave": 1}}, "tasks.weights: there is no part 'wave'; did you mean 'waves'"),
        ({"weights": {"waves": 0, "lines": 0}}, "must be 0 or more and finite, and one of them above 0"),
        ({"weights": {"waves": -1}}, "must be 0 or more"),
        ({"reads": "x"}, "tasks.reads: there is no part 'x'"),
        ({"each": {"shots": 3}}, "tasks.each is for parts that a configuration names"),
    ],
)
def test_settings_of_a_mixture_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture({"waves": Sinusoid(), "lines": SimpleFunction()}, **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.of.waves.shot=3", "tasks.of.waves.shot: unknown key; did you mean 'shots'"),
        ("tasks.of.waves.noise=-1", "tasks.of.waves: tasks.noise is -1"),
        ("tasks.of.waves=3", "tasks.of.waves: a part is a mapping such as"),
        ("tasks.of.lines.family=circle", "tasks.of.lines.family: input should be 'line'"),
        ("tasks.of.lines.use=sinusoids", "tasks.of.lines.use: 'sinusoids' is not known; did you mean 'sinusoid'"),
        ("tasks.each.ways=3", r"tasks.of.\w+.ways: unknown key"),
        ("tasks.each.image_size=0", "tasks.of.waves.image_size: unknown key"),
    ],
)
def test_mistakes_in_a_configured_mixture_name_their_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(load("functions-maml", [override]))
    with pytest.raises(ConfigError, match=r"tasks.of: input should be settings, \{key: value\}"):
        assemble(load({"tasks": {"use": "mixture", "of": [{"use": "glyphs"}]}}))


def test_a_configured_mixture_is_whole_and_built_with_what_each_part_gets() -> None:
    config = complete(
        load("functions-maml", ["tasks.each.shots=7", "tasks.of.lines.noise=0.5", "tasks.weights.lines=2"])
    )
    assert config.tasks.options["of"]["lines"] == {
        "use": "function", "shots": 7, "queries": 10, "test_queries": 100, "noise": 0.5, "family": "line",
    }  # fmt: skip
    assert complete(config) == config
    tasks: Any = assemble(config).problem.tasks
    assert tasks.of["lines"].noise == 0.5 and {part.shots for part in tasks.of.values()} == {7}
    # what is printed is a configuration again, and says what the parts' options mean
    text = explain_config(config)
    assert "# line, parabola, tanh or absolute." in text
    assert load(yaml.safe_load(text)).tasks.options["of"] == config.tasks.options["of"]


def test_the_data_of_parts_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture(
        {"a": Numbered(queries=2), "b": Numbered(ways=3, queries=2, version="2"), "user": Blobs((1, 4, 4))}
    )
    mixture.prepare()
    copy: Mixture = pickle.loads(pickle.dumps(mixture))
    assert copy.at_hand() and set(mixture.data()) == {"a", "b"}
    copy.attach(mixture.data())
    assert copy.of["a"].dataset is mixture.of["a"].dataset
    one, other = (m.sample(stream(1), "test") for m in (mixture, copy))
    assert torch.equal(one.support_set[0], other.support_set[0])


def test_images_are_brought_to_one_form(cifar_root: Path) -> None:
    settings = ["tasks.of.photos.image_size=28", "tasks.of.photos.channels=1"]
    tasks = {"use": "mixture", "of": {"printed": {"use": "glyphs"}, "photos": {"use": "cifar_fs"}}}
    base = {"tasks": tasks, "data_root": str(cifar_root)}
    with pytest.raises(
        ConfigError, match=r"printed has inputs of shape \(1, 28, 28\) and photos of \(3, 32, 32\): set "
    ):
        assemble(load(base))
    mixture: Any = assemble(load(base, settings)).problem.tasks
    x, _ = mixture.of["photos"].sample(stream(0), "train").support_set
    whole, _ = distmeta.tasks.cifar.CifarFS(data_root=str(cifar_root)).sample(stream(0), "train").support_set
    assert x.shape == (5, 1, 28, 28) and x.min() >= 0 and x.max() <= 1
    grey = 0.299 * whole[:, 0] + 0.587 * whole[:, 1] + 0.114 * whole[:, 2]
    assert torch.allclose(x.mean((1, 2, 3)), grey.mean((1, 2)), atol=0.01)
    colour = Glyphs(image_size=32, channels=3)
    image = colour.sample(stream(0), "val").support_set[0]
    assert image.shape == (5, 3, 32, 32) == (5, *colour.spec.input_shape) and torch.equal(image[:, 0], image[:, 2])

"""Configurations: packaged ones, overrides, and their printed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distmeta.config import Config, load, packaged
from distmeta.core.params import Layout, join
from distmeta.errors import ConfigError, DistmetaError
from distmeta.experiment import assemble, complete
from distmeta.explain import explain_config


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_configuration_prints_as_one_that_means_the_same(name: str, tmp_path: Path) -> None:
    config = complete(load(name))
    path = tmp_path / f"{name}.yaml"
    path.write_text(explain_config(config))
    assert complete(load(path)) == config
    undocumented = [
        line
        for line in path.read_text().splitlines()
        if line.strip() and "#" not in line and not line.startswith("  - ")
    ]
    assert not undocumented


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_configuration_fits_together(name: str) -> None:
    experiment = assemble(load(name), prepare=False)
    assert experiment.problem.layout == Layout.of(experiment.initial)
    again = assemble(load(name), prepare=False)
    assert all((experiment.initial[key] == tensor).all() for key, tensor in again.initial.items())
    assert list(experiment.initial) == list(join(experiment.problem.algorithm.init(experiment.problem.loss.init())))


def test_overrides_are_read_as_yaml() -> None:
    config = load(None, ["outer.lr=1e-2", "train.steps=1e3", "outer.options.betas=[0.5, 0.9]", "loss=null"])
    assert (config.outer.lr, config.train.steps, config.loss) == (0.01, 1000, None)
    assert config.outer.options == {"betas": [0.5, 0.9]}
    assert config.outer.schedule is not None
    assert config.outer.schedule.options == {"T_max": 1000}  # follows train.steps


def test_another_component_starts_from_its_own_defaults() -> None:
    config = complete(load("glyphs-5way-1shot-maml", ["algorithm.use=reptile", "algorithm.inner_steps=7"]))
    assert config.algorithm.options["inner_lr"] == 1e-3  # and not MAML's 0.4
    assert config.algorithm.options["inner_steps"] == 7
    assert load("glyphs-5way-1shot-maml", ["algorithm.use=maml"]).algorithm.options["inner_lr"] == 0.4


def test_the_environment_gives_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from distmeta.tasks.omniglot import Omniglot

    monkeypatch.setenv("DISTMETA_DATA", str(tmp_path))
    assert Omniglot().root == tmp_path
    assert assemble(load("omniglot-5way-1shot-maml", ["data_root=/given"]), prepare=False).problem.tasks.root == Path(
        "/given"
    )


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
sections = st.sampled_from([*Config.model_fields, "use", "steps", "lr"])


@given(st.dictionaries(sections, trees | st.dictionaries(sections, trees, max_size=3), max_size=4))
def test_any_mapping_is_a_configuration_or_a_configuration_error(data: dict) -> None:
    try:
        assert isinstance(load(data), Config)
    except DistmetaError as error:
        assert isinstance(error, ConfigError)
        assert str(error)


@given(st.text(max_size=30))
def test_any_text_file_is_a_configuration_or_a_configuration_error(tmp_path_factory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(load(path), Config)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_defaults_are_those_of_the_design() -> None:
    config = load({})
    assert yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))["scaling"]["num_workers"] == "auto"
    assert config.scaling.threads_per_worker == 1

"""A search: what its file says, and the configurations that its samples mean."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from pydantic import Field, model_validator
from ray.tune.search.sample import Domain

from distmeta.components import Component
from distmeta.config import DEFAULT, Config, Section, load, merge
from distmeta.errors import ConfigError
from distmeta.experiment import complete
from distmeta.tune.space import Space, flat, overrides

Mode = Literal["max", "min"]


class Search(Section):
    """A search over meta-hyperparameters."""

    name: str | None = Field(None, description="name of the search; null: that of its file")
    base: str | dict[str, Any] = Field(
        DEFAULT, description="configuration that all trials start from: a packaged name or a YAML file"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="settings of all trials, dotted or nested")
    space: dict[str, Any] = Field(description="settings to search, each with a distribution in Tune's vocabulary")
    samples: int = Field(16, ge=1, description="trials, or repetitions of the whole grid where there is a grid_search")
    seeds: list[int] | None = Field(
        None, min_length=1, description="each configuration is trained once with each; null: once, with the base's seed"
    )
    seed: int = Field(0, ge=0, description="of the searcher's own random numbers")
    metric: str | list[str] = Field(
        "accuracy", description="what validation calls it, or seconds; a list: several at once (optuna alone)"
    )
    mode: Mode | list[Mode] = Field("max", description="max or min; a list for a list of metrics")
    searcher: Component = Field(Component(use="random"), description="random (grids too) or optuna")
    scheduler: Component = Field(Component(use="none"), description="none, asha, hyperband, median or pbt")
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; null: as many as fit")
    seconds: float | None = Field(None, gt=0, description="wall time after which all trials are stopped")
    max_failures: int = Field(2, ge=0, description="times that a trial whose process or node is lost is begun again")
    driver_cpus: float = Field(1.0, gt=0, description="CPU cores of a trial's driver; without workers it computes")
    autoscaling: bool = Field(False, description="trials may wait for nodes to come, beyond what the cluster has now")
    log_to: list[Literal["wandb", "mlflow"]] = Field(
        default_factory=list, description="services beside TensorBoard: wandb, mlflow (packages to be installed)"
    )
    test: bool = Field(True, description="evaluate the winner, once, on test tasks")
    run_dir: str | None = Field(None, description="folder of the search, which must be new; null: runs/NAME-TIME")

    @model_validator(mode="after")
    def _whole(self) -> Search:
        if isinstance(self.metric, list) != isinstance(self.mode, list) or len(self.metrics) != len(self.modes):
            raise ConfigError(f"mode: give one max or min for each metric; given {self.mode} for {self.metric}")
        if len(self.metrics) > 1 and (self.searcher.use != "optuna" or self.scheduler.use != "none"):
            raise ConfigError("metric: several at once need searcher.use: optuna and scheduler.use: none")
        if self.seeds and "seed" in self.set:
            raise ConfigError("set.seed: seeds stand under seeds; take it out of set")
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: one stands there twice: {self.seeds}")
        if self.searcher.use == "optuna" and self.scheduler.use == "pbt":
            raise ConfigError("searcher: pbt draws and changes values itself; take searcher.use: random with it")
        if self.seeds and (self.searcher.use != "random" or self.scheduler.use != "none"):
            raise ConfigError(
                "seeds: several need searcher.use: random and scheduler.use: none (which others would judge or stop "
                "the runs of one configuration one by one)"
            )
        return self

    @cached_property
    def parsed(self) -> Space:
        """The search space."""
        return Space(self.space)

    @property
    def metrics(self) -> list[str]:
        """The metrics, the one that counts first."""
        return self.metric if isinstance(self.metric, list) else [self.metric]

    @property
    def modes(self) -> list[Mode]:
        """``max`` or ``min`` for each metric."""
        return self.mode if isinstance(self.mode, list) else [self.mode]

    @property
    def trials(self) -> int:
        """How many trials there will be."""
        grids = [len(d.values or ()) for d in self.parsed.dimensions if not isinstance(d.domain, Domain)]
        return self.samples * prod(grids) * len(self.seeds or [0])

    def trial_config(self, sample: Mapping[str, Any], **settings: Any) -> Config:
        """The configuration of the trial that ``sample`` means.

        Raises:
            ConfigError: The settings do not go together.
        """
        changes = {"scaling.num_workers": 0, "evaluation.tasks": 0} | self._changes(sample) | settings
        config = load(self.base, overrides(changes))
        return config.model_copy(
            update={"checkpoint": config.checkpoint.model_copy(update={"every": max(config.validation.every, 1)})}
        )

    def winner(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that ``sample`` means outside of a search: on all cores, judged on test tasks.

        They are complete, and interpolations such as ``${train.steps}`` stand in them, so that they can be changed.
        """
        changes = overrides(self._changes(sample))
        whole = complete(load(self.base, changes)).model_dump(mode="json")
        settings = OmegaConf.to_container(OmegaConf.merge(whole, merge(self.base, changes)), resolve=False)
        return {str(key): value for key, value in cast("dict[Any, Any]", settings).items()}

    def _changes(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        seed = {"seed": sample["seed"]} if "seed" in sample else {}
        return flat(self.set) | self.parsed.settings(sample) | seed

"""A search: its file, and the searchers and schedulers of Tune that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Categorical, Domain
from torch import equal

from distmeta.components import Component, build, explain, find, nearest
from distmeta.config import DEFAULT, Config, Section, load, merge, packaged, read_yaml
from distmeta.distributed.cluster import demand
from distmeta.errors import ConfigError, DistmetaError, at_least, one_line, positive
from distmeta.experiment import assemble, complete
from distmeta.tune.space import Space, flat, nested, overrides

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


def load_search(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> Search:
    """A search from a name of ``tune_configs/``, a YAML file or a mapping, changed by ``key=value`` strings.

    Raises:
        ConfigError: It cannot be read, or a key is unknown, of the wrong type or out of range.
    """
    where = "the search"
    if isinstance(source, Mapping):
        data: dict[str, Any] = {"name": "search"} | dict(source)
    else:
        path = _path_of(source)
        where, data = str(path), {"name": path.stem} | read_yaml(path)
    if isinstance(data.get("set"), Mapping):
        data["set"] = nested(data["set"])  # so that set.train.steps=… meets what stands there as train.steps
    for change in changes:
        if "=" not in change or change.startswith(("=", "-")):
            raise ConfigError(f"{change!r} is not an override; give key=value, for example samples=8")
    try:
        merged = OmegaConf.merge(OmegaConf.create(data), OmegaConf.from_dotlist(list(changes)))
        # Interpolations such as ${train.steps} are those of the trials' configuration, and are resolved there.
        search = Search.model_validate(OmegaConf.to_container(merged, resolve=False))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, Search)}") from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{where} cannot be read: {one_line(error)}") from error
    if isinstance(search.base, str) and search.base not in packaged():
        base = Path(search.base)
        if not base.is_absolute() and not base.exists() and not isinstance(source, Mapping):
            base = _path_of(source).parent / base
        if base.suffix in (".yaml", ".yml") and base.is_file():
            search = search.model_copy(update={"base": {"name": base.stem} | read_yaml(base)})
    try:
        check(search)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return search


def check(search: Search) -> None:
    """Whether every trial that can be drawn is one that ``distmeta train`` would accept.

    Every listed value and every bound is tried, and some samples drawn at random: each is assembled up to the model
    and the algorithm, without data.

    Raises:
        ConfigError: One is not.
    """
    space = search.parsed
    load(search.base, overrides(flat(search.set)))  # before the probes: mistakes in set and base are not the space's
    for key in sorted(
        {d.key for d in space.dimensions if not d.given and d.alternatives is None} & flat(search.set).keys()
    ):
        raise ConfigError(f"{key} stands under set and under space; take it out of one of them")
    if flat(search.set).get("scaling.num_workers") == "auto":
        raise ConfigError("set.scaling.num_workers: a trial needs a number of workers; 0 computes in its own process")
    budgets: set[int] = set()
    workers = flat(search.set).get("scaling.num_workers", 0)
    if workers and not any(demand(load(search.base, overrides(flat(search.set))).scaling).values()):
        raise ConfigError("set.scaling.cpus_per_worker: 0; a trial's workers must be given something to be placed by")
    for label, sample in space.probes():
        where = f"space.{label} = {sample[label]!r}" if label else f"space, at {space.settings(sample)}"
        try:
            config = search.trial_config(sample)
            budgets.add(_budget_of(config))
            assemble(config, prepare=False)
        except DistmetaError as error:
            raise ConfigError(f"{where}: {error}") from error
    if len(budgets) > 1 and search.scheduler.use != "none":
        raise ConfigError(
            f"train.steps differs between trials ({', '.join(map(str, sorted(budgets)))}), which scheduler.use: "
            f"{search.scheduler.use} compares by their steps; take it out of the space, or take scheduler.use: none"
        )
    make_searcher(search)
    make_scheduler(search)


def _budget_of(config: Config) -> int:
    steps, every = config.train.steps, config.validation.every
    if not every or not steps or steps % every:
        raise ConfigError(
            f"validation.every must divide train.steps, so that each trial ends with a validation; they are {every} "
            f"and {steps}: write both under set"
        )
    return steps


def make_searcher(search: Search) -> Any:
    """Tune's searcher, or its generator of random and grid variants.

    Raises:
        ConfigError: It is unknown or refuses its options.
    """
    make = find("searcher.use", search.searcher.use, SEARCHERS)
    return build("searcher", make, search.searcher.options, search=search)


def make_scheduler(search: Search) -> TrialScheduler:
    """Tune's scheduler, which counts time in outer steps.

    Raises:
        ConfigError: It is unknown or refuses its options.
    """
    make = find("scheduler.use", search.scheduler.use, SCHEDULERS)
    return build("scheduler", make, search.scheduler.options, search=search)


def random(search: Search) -> BasicVariantGenerator:
    """Independent samples; a ``grid_search`` is repeated for each."""
    return BasicVariantGenerator(
        constant_grid_search=True, random_state=search.seed, max_concurrent=search.max_concurrent or 0
    )


def optuna(
    search: Search,
    startup: Annotated[int, "trials drawn at random before the model of good ones is trusted"] = 10,
) -> Any:
    """Optuna's tree-structured Parzen estimator; several metrics at once give a Pareto front."""
    from optuna.samplers import TPESampler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    if search.parsed.has_grid:
        raise ConfigError("searcher: optuna takes no grid_search; write choice instead, or take searcher.use=random")
    for dimension in search.parsed.dimensions:
        if dimension.distribution in ("randn", "qrandn", "qloguniform", "qlograndint"):
            raise ConfigError(f"space.{dimension.label}: optuna takes no {dimension.distribution}; give another one")
    sampler = TPESampler(seed=search.seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    searcher = OptunaSearch(metric=search.metric, mode=search.mode, sampler=sampler)  # pyright: ignore[reportArgumentType]
    return ConcurrencyLimiter(searcher, max_concurrent=search.max_concurrent) if search.max_concurrent else searcher


def none() -> FIFOScheduler:
    """Every trial runs to its end."""
    return FIFOScheduler()


def asha(
    search: Search,
    grace: Annotated[int | None, "outer steps before a trial may be stopped; null: one validation"] = None,
    reduction_factor: Annotated[float, "of the trials that reach a rung, 1 in so many goes on"] = 3,
    brackets: Annotated[int, "different first rungs"] = 1,
) -> AsyncHyperBandScheduler:
    """Asynchronous successive halving (Li et al., 2020): at each rung the worse trials are stopped."""
    steps, every = _budget(search)
    grace = _interval("scheduler.grace", grace, steps, every)
    _check_factor(reduction_factor)
    at_least("scheduler.brackets", brackets, 1)
    return AsyncHyperBandScheduler("step", max_t=steps, grace_period=grace, reduction_factor=reduction_factor,
                                   brackets=brackets)  # fmt: skip


def hyperband(
    search: Search,
    reduction_factor: Annotated[float, "of the trials of a bracket, 1 in so many goes on"] = 3,
) -> HyperBandScheduler:
    """HyperBand (Li et al., 2017): brackets of successive halving, which wait for all of their trials.

    Its unit of time is the validation, which makes as many brackets as there is something to decide.
    """
    _check_factor(reduction_factor)
    steps, every = _budget(search)
    return HyperBandScheduler("validations", max_t=steps // every, reduction_factor=reduction_factor)


def median(
    search: Search,
    grace: Annotated[int | None, "outer steps before a trial may be stopped; null: one validation"] = None,
    min_trials: Annotated[int, "trials to compare with before one may be stopped"] = 3,
) -> MedianStoppingRule:
    """A trial is stopped when its best is worse than the median of the others' running means (Golovin et al., 2017)."""
    grace = _interval("scheduler.grace", grace, *_budget(search))
    return MedianStoppingRule("step", grace_period=grace, min_samples_required=min_trials)


def pbt(
    search: Search,
    interval: Annotated[int | None, "outer steps between exploitations; null: one validation"] = None,
    mutate: Annotated[list[str] | None, "keys to change in live runs; null: all of the space"] = None,
    quantile: Annotated[float, "share of the worst trials that take over state and settings of the best"] = 0.25,
    resample: Annotated[float, "probability that a mutated value is drawn anew, not perturbed"] = 0.25,
) -> PopulationBasedTraining:
    """Population based training (Jaderberg et al., 2017): the worst go on from the best, with changed rates."""
    space, (steps, every) = search.parsed, _budget(search)
    labels = {dimension.label: dimension for dimension in space.dimensions}
    chosen = mutate or list(labels)
    for label in chosen:
        if label not in labels:
            raise ConfigError(f"scheduler.mutate: {label} is no key of the space{nearest(label, labels)}")
        _check_live(search, label)
    bounds = {label: labels[label].domain for label in chosen}

    def clip(config: dict[str, Any]) -> dict[str, Any]:
        """Perturbation multiplies by 0.8 or 1.2, and knows no bounds."""
        for label, domain in bounds.items():
            if isinstance(domain, Domain) and not isinstance(domain, Categorical):
                low, high = labels[label].probes()
                step = getattr(domain.get_sampler(), "q", None)
                value = config[label] if step is None else round(config[label] / step) * step
                config[label] = domain.cast(min(max(value, low), high))
        return config

    return PopulationBasedTraining(
        "step",
        perturbation_interval=_interval("scheduler.interval", interval, steps, every),
        hyperparam_mutations={label: labels[label].values or domain for label, domain in bounds.items()},  # pyright: ignore[reportArgumentType]
        quantile_fraction=quantile,
        resample_probability=resample,
        custom_explore_fn=clip,
    )


SEARCHERS: dict[str, Callable[..., Any]] = {"random": random, "optuna": optuna}
SCHEDULERS: dict[str, Callable[..., TrialScheduler]] = {
    "none": none, "asha": asha, "hyperband": hyperband, "median": median, "pbt": pbt,
}  # fmt: skip


def _check_live(search: Search, label: str) -> None:
    """Raises `ConfigError` if changing ``label`` would not change how a live run goes on, or would make it another."""
    space = search.parsed
    dimension = next(d for d in space.dimensions if d.label == label)
    if not dimension.key.startswith(("outer.lr", "outer.clip_norm", "algorithm.")):
        raise ConfigError(f"scheduler.mutate: {label} cannot change in a live run; outer.lr, outer.clip_norm and the "
                          "options of the algorithm can")  # fmt: skip
    if dimension.distribution in ("randn", "qrandn"):
        raise ConfigError(f"space.{label}: pbt takes no {dimension.distribution}; give bounds")
    if dimension.key == "outer.lr" and search.trial_config(space.first()).outer.schedule is not None:
        raise ConfigError("scheduler.mutate: outer.lr follows outer.schedule; write set: {outer.schedule: null}, since "
                          "the population makes a schedule of its own")  # fmt: skip
    low, high = dimension.probes()[0], dimension.probes()[-1]
    ends = [
        assemble(search.trial_config(space.first() | dict(dimension.given) | {label: value}), prepare=False).initial
        for value in (low, high)
    ]
    if ends[0].keys() != ends[1].keys() or not all(equal(tensor, ends[1][name]) for name, tensor in ends[0].items()):
        raise ConfigError(
            f"scheduler.mutate: {label} sets where meta-parameters start from; in a live run it would have no effect"
        )


def _check_factor(factor: float) -> None:
    if not factor > 1:
        raise ConfigError(f"scheduler.reduction_factor must be a number above 1; given: {factor:g}")


def _budget(search: Search) -> tuple[int, int]:
    config = search.trial_config(search.parsed.first())
    return config.train.steps, config.validation.every


def _interval(key: str, given: int | None, steps: int, every: int) -> int:
    """Outer steps: ``given``, or those between validations."""
    if given is None:
        return every
    positive(key, given)
    if given > steps:
        raise ConfigError(f"{key} must be at most train.steps = {steps}; given: {given}")
    return given


def searches() -> dict[str, Path]:
    """The searches that come with the package, by name."""
    here = Path(__file__).parent
    folders = [here / "configs", here.parents[1] / "tune_configs"]  # as a wheel has them, and as the source tree
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _path_of(source: str | Path) -> Path:
    known = searches()
    if str(source) in known:
        return known[str(source)]
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"no file {path}")
    raise ConfigError(
        f"no search {str(source)!r}{nearest(str(source), known)}; known are {', '.join(known) or 'none'}, and a path "
        "must end in .yaml"
    )

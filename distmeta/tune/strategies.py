"""The searchers and schedulers of Tune that a search names, with the options that its file may give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

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

from distmeta.components import build, find, nearest
from distmeta.errors import ConfigError, at_least, positive
from distmeta.experiment import assemble
from distmeta.tune.search import Search


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
        assemble(search.trial_config(space.first() | dict(dimension.given) | {label: value}), prepare=()).initial
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

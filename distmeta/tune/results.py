"""What has come out of a search: its trials, the best configuration, and how much each setting matters."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from ray.tune import ResultGrid
from ray.tune.search.sample import Domain

from distmeta.errors import one_line
from distmeta.tune.search import Search
from distmeta.tune.space import Dimension

STATES = ("finished", "pruned", "failed", "unfinished")


@dataclass(frozen=True)
class Trial:
    """One run of a search."""

    name: str
    sample: dict[str, Any]
    """A value for each dimension of the space; with the seed, if there are several."""
    state: str
    """``finished``, ``pruned``, ``failed`` or ``unfinished``."""
    failure: str
    """Why it failed; empty otherwise."""
    history: list[dict[str, Any]]
    """What it has reported, a mapping for each validation."""
    folder: str | None
    """Its run folder as Tune has kept it."""

    @property
    def step(self) -> int:
        """Outer steps that it has come to."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def seconds(self) -> float:
        """What it has cost: seconds of meta-training."""
        return float(self.history[-1]["seconds"]) if self.history else 0.0

    def score(self, metric: str, mode: str) -> float:
        """The best of its validations, which is what its best checkpoint holds; NaN if there is none."""
        values = [row[metric] for row in self.history if math.isfinite(row.get(metric, math.nan))]
        return float((max if mode == "max" else min)(values)) if values else math.nan

    def key(self) -> str:
        """The same for trials that differ in their seed alone."""
        return json.dumps({k: v for k, v in self.sample.items() if k != "seed"}, sort_keys=True, default=str)


@dataclass(frozen=True)
class Group:
    """One configuration with all its seeds."""

    trials: list[Trial]
    mean: float
    """Of the scores; NaN if a seed has none, since a configuration that fails for one seed has failed."""
    spread: float = field(default=0.0)
    """Standard deviation of the scores over seeds."""


def trials_of(grid: ResultGrid, search: Search) -> list[Trial]:
    """The trials of a search, finished or not, in the order in which they were drawn."""
    trials: list[Trial] = []
    for result in sorted((grid[i] for i in range(len(grid))), key=lambda result: result.path):
        frame = result.metrics_dataframe
        rows = [] if frame is None else cast("list[dict[str, Any]]", frame.to_dict("records"))
        failure = next((str(row["failure"]) for row in rows if isinstance(row.get("failure"), str)), "")
        if not failure and result.error is not None:
            failure = one_line(result.error).rpartition("distmeta.errors.")[2] or "lost"
        history = [row for row in rows if "tasks_per_second" in row and not isinstance(row.get("failure"), str)]
        step = int(history[-1]["step"]) if history else 0
        done = bool(rows and rows[-1].get("done"))
        sample = dict(result.config or {})
        finished = step >= steps_of(search, sample)
        state = "failed" if failure else "finished" if finished else "pruned" if done else "unfinished"
        folder = result.checkpoint.path if result.checkpoint else None
        trials.append(Trial(Path(result.path).name, sample, state, failure, history, folder))
    return trials


def steps_of(search: Search, sample: Mapping[str, Any]) -> int:
    """Outer steps of a trial that is not stopped early."""
    return search.trial_config(sample).train.steps


def groups_of(trials: Sequence[Trial], search: Search) -> list[Group]:
    """The configurations, the best by the first metric first; those without a score last."""
    metric, mode = search.metrics[0], search.modes[0]
    groups: list[Group] = []
    for key in dict.fromkeys(trial.key() for trial in trials):
        members = [trial for trial in trials if trial.key() == key]
        scores = np.array([math.nan if t.state == "failed" else t.score(metric, mode) for t in members])
        groups.append(Group(members, float(scores.mean()), float(scores.std(ddof=1)) if len(scores) > 1 else 0.0))
    sign = -1 if mode == "max" else 1
    return sorted(groups, key=lambda group: (math.isnan(group.mean), sign * np.nan_to_num(group.mean)))


def winner_of(groups: Sequence[Group]) -> Group | None:
    """The best configuration that was trained to its end, or if none was, the best of all; None if all have failed."""
    scored = [group for group in groups if math.isfinite(group.mean)]
    finished = [group for group in scored if all(trial.state == "finished" for trial in group.trials)]
    return (finished or scored or [None])[0]


def front_of(groups: Sequence[Group], search: Search) -> list[Group]:
    """The configurations that no other one beats in every metric at once (the Pareto front)."""
    signs = [1.0 if mode == "max" else -1.0 for mode in search.modes]
    points = {
        id(group): [
            sign * float(np.mean([t.score(m, mode) for t in group.trials]))
            for sign, m, mode in zip(signs, search.metrics, search.modes, strict=True)
        ]
        for group in groups
        if math.isfinite(group.mean)
    }
    return [
        group
        for group in groups
        if id(group) in points
        and not any(
            all(a >= b for a, b in zip(other, points[id(group)], strict=True)) and other != points[id(group)]
            for other in points.values()
        )
    ]


def importances(trials: Sequence[Trial], search: Search) -> dict[str, float]:
    """How much of being among the best quarter each setting explains; the shares sum to 1, the greatest first.

    PED-ANOVA (Watanabe et al., 2023) by Optuna, over all trials with a score, pruned ones too, and over the settings
    that all of them have. Empty for fewer than 8 trials, which tell nothing.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    metric, mode = search.metrics[0], search.modes[0]
    scored = [trial for trial in trials if math.isfinite(trial.score(metric, mode))]
    always = [dimension for dimension in search.parsed.dimensions if not dimension.given]
    distributions = {d.label: found for d in always if (found := _distribution(d, scored))}
    if len(scored) < 8 or not distributions:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    for trial in scored:
        params = {label: trial.sample[label] for label in distributions}
        value = trial.score(metric, mode)
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))


def _distribution(dimension: Dimension, trials: Sequence[Trial]) -> Any:
    """The range of a dimension in Optuna's words; None if all trials have the same value."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    seen = [trial.sample[dimension.label] for trial in trials]
    if len({json.dumps(value, default=str) for value in seen}) < 2:
        return None
    if (values := dimension.values) is not None:
        return CategoricalDistribution(list(dict.fromkeys(values)))
    assert isinstance(dimension.domain, Domain)
    kind = IntDistribution if type(dimension.domain).__name__ == "Integer" else FloatDistribution
    return kind(min(seen), max(seen), log=dimension.logarithmic)


def table_csv(trials: Sequence[Trial], search: Search) -> str:
    """``results.csv``: a row for each trial."""
    labels = [dimension.label for dimension in search.parsed.dimensions]
    columns = ["trial", "state", "seed", *labels]
    measures = ["best_" + metric for metric in search.metrics]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*columns, "step", *measures, "train_seconds", "failure", "folder"])
    for trial in trials:
        active = {d.label for d in search.parsed.active(trial.sample)}
        values = [trial.sample[label] if label in active else "" for label in labels]
        scores = [trial.score(metric, mode) for metric, mode in zip(search.metrics, search.modes, strict=True)]
        seed = trial.sample.get("seed", search.seeds[0])
        writer.writerow(
            [trial.name, trial.state, seed, *values, trial.step, *scores, trial.seconds, trial.failure, trial.folder]
        )
    return out.getvalue()

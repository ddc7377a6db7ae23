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
from ray.tune import ExperimentAnalysis
from ray.tune.search.sample import Domain

from distmeta.errors import one_line
from distmeta.evaluation import better, finals
from distmeta.runs import RunFolder
from distmeta.tune.search import Search
from distmeta.tune.space import Dimension
from distmeta.tune.trial import COSTS

STATES = ("finished", "pruned", "failed", "unfinished")


def state_of(status: str, last: Mapping[str, Any] | None, steps: int) -> str:
    """What has become of a trial: one of `STATES`, or ``running``, ``paused`` or ``waiting``.

    Args:
        status: In Tune's words.
        last: What it has reported last, if anything.
        steps: Outer steps to its end.
    """
    last = {} if last is None else last
    if isinstance(last.get("failure"), str) or status == "ERROR":
        return "failed"
    if status == "TERMINATED":
        return "finished" if last.get("step", 0) >= steps else "pruned"
    return {"RUNNING": "running", "PAUSED": "paused"}.get(status, "waiting")


@dataclass(frozen=True)
class Trial:
    """One run of a search."""

    name: str
    sample: dict[str, Any]
    """A value for each dimension of the space; with the seed, if there are several."""
    state: str
    """One of `STATES`."""
    failure: str
    """Why it failed; empty otherwise."""
    reports: list[dict[str, Any]]
    """What it has reported, a mapping for each validation."""
    lineage: list[dict[str, Any]]
    """The validations of the run that it has come to hold: its own, or in population based training another's first."""
    folder: str | None
    """Its run folder as Tune has kept it."""

    @property
    def step(self) -> int:
        """Outer steps that it has come to."""
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def seconds(self) -> float:
        """What it has cost: seconds of meta-training."""
        return float(self.reports[-1]["seconds"]) if self.reports else 0.0

    def score(self, metric: str) -> float:
        """The metric at the run's best checkpoint, or what the whole of it has cost; NaN if it has no validation."""
        if metric in COSTS:
            return float(self.reports[-1][metric]) if self.reports else math.nan
        best: dict[str, Any] | None = None
        for evaluation in self.lineage:
            if better(evaluation, best["after"]["mean"] if best else None):  # as the run chooses its best checkpoint
                best = evaluation
        return finals(best)[metric] if best else math.nan


@dataclass(frozen=True)
class Group:
    """One configuration with all its seeds."""

    trials: list[Trial]
    mean: float
    """Of the scores; NaN if a seed has none, since a configuration that fails for one seed has failed."""
    spread: float = field(default=0.0)
    """Standard deviation of the scores over seeds."""

    @property
    def finished(self) -> bool:
        """Whether all of its trials were trained to their end."""
        return all(trial.state == "finished" for trial in self.trials)


def trials_of(folder: Path, search: Search) -> list[Trial]:
    """The trials whose state Tune has kept in ``folder``, in the order in which they were drawn."""
    analysis = ExperimentAnalysis(str(folder))
    return sorted((_trial(trial, analysis, search) for trial in analysis.trials), key=lambda trial: trial.name)


def _trial(trial: Any, analysis: ExperimentAnalysis, search: Search) -> Trial:
    frame = analysis.trial_dataframes.get(trial.trial_id)
    rows = [] if frame is None else cast("list[dict[str, Any]]", frame.to_dict("records"))
    failure = next((str(row["failure"]) for row in rows if isinstance(row.get("failure"), str)), "")
    state = state_of(trial.status, trial.last_result, search.trial_config(trial.config).train.steps)
    if state == "failed" and not failure:
        failure = _lost(trial)
    reports = [row for row in rows if "tasks_per_second" in row and not isinstance(row.get("failure"), str)]
    folder = trial.checkpoint.path if trial.checkpoint else None
    records = RunFolder(folder).records() if folder and Path(folder).is_dir() else []
    lineage = [record for record in records if record["kind"] == "val"]
    # The search has ended: what has reported and is still paused was not taken up again.
    known = state if state in STATES else "pruned" if reports else "unfinished"
    return Trial(Path(trial.path).name, dict(trial.config), known, failure, reports, lineage, folder)


def _lost(trial: Any) -> str:
    """Why a trial's process has ended, in a sentence."""
    error = trial.get_error()
    text = "" if error is None else one_line(error)
    if "distmeta.errors." in text:
        return text.rpartition("distmeta.errors.")[2]
    return f"its process was lost or raised ({text[:200]}…)" if len(text) > 200 else text or "its process was lost"


def groups_of(trials: Sequence[Trial], search: Search) -> list[Group]:
    """The configurations, the best by the first metric first; those without a score last."""
    members: dict[str, list[Trial]] = {}
    for trial in trials:
        # Without several seeds every trial stands for itself, also where two have drawn the same values.
        plain = {key: value for key, value in trial.sample.items() if key != "seed"}
        members.setdefault(json.dumps(plain, sort_keys=True, default=str) if search.seeds else trial.name, []).append(
            trial
        )
    groups: list[Group] = []
    for group in members.values():
        scores = np.array([math.nan if t.state == "failed" else t.score(search.metrics[0]) for t in group])
        groups.append(Group(group, float(scores.mean()), float(scores.std(ddof=1)) if len(scores) > 1 else 0.0))
    sign = -1 if search.modes[0] == "max" else 1
    return sorted(groups, key=lambda group: (math.isnan(group.mean), sign * np.nan_to_num(group.mean)))


def winner_of(groups: Sequence[Group]) -> Group | None:
    """The best configuration that was trained to its end, or if none was, the best of all; None if all have failed."""
    scored = [group for group in groups if math.isfinite(group.mean)]
    return ([group for group in scored if group.finished] or scored or [None])[0]


def front_of(groups: Sequence[Group], search: Search) -> list[Group]:
    """The finished configurations that no other one beats in every metric at once (the Pareto front)."""
    signs = [1.0 if mode == "max" else -1.0 for mode in search.modes]
    finished = [group for group in groups if group.finished and math.isfinite(group.mean)]
    points = [
        [
            sign * float(np.mean([t.score(m) for t in group.trials]))
            for sign, m in zip(signs, search.metrics, strict=True)
        ]
        for group in finished
    ]
    return [
        group
        for group, point in zip(finished, points, strict=True)
        if not any(all(a >= b for a, b in zip(o, point, strict=True)) and o != point for o in points)
    ]


def importances(trials: Sequence[Trial], search: Search) -> dict[str, float]:
    """How much of being among the best quarter each setting explains; the shares sum to 1, the greatest first.

    PED-ANOVA (Watanabe et al., 2023) by Optuna, over all trials with a score, pruned ones too, and over the settings
    that all of them have. Empty for fewer than 8 trials, which tell nothing.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    metric, mode = search.metrics[0], search.modes[0]
    scored = [trial for trial in trials if math.isfinite(trial.score(metric))]
    always = [dimension for dimension in search.parsed.dimensions if not dimension.given]
    distributions = {d.label: found for d in always if (found := _distribution(d, scored))}
    if len(scored) < 8 or not distributions:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    for trial in scored:
        params = {label: trial.sample[label] for label in distributions}
        value = trial.score(metric)
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
    measures = [metric if metric in COSTS else f"best_{metric}" for metric in search.metrics]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*columns, "step", *measures, "train_seconds", "failure", "folder"])
    for trial in trials:
        active = {d.label for d in search.parsed.active(trial.sample)}
        values = [trial.sample[label] if label in active else "" for label in labels]
        scores = [trial.score(metric) for metric in search.metrics]
        seed = search.trial_config(trial.sample).seed
        writer.writerow(
            [trial.name, trial.state, seed, *values, trial.step, *scores, trial.seconds, trial.failure, trial.folder]
        )
    return out.getvalue()

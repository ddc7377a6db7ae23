"""Running a search: Tune's tuner over trials that are whole distributed runs, and what is kept of it.

The folder of a search holds ``search.yaml`` (whole), ``trials/`` (Tune's: the run folder of each trial, TensorBoard's
files, and the state to go on from), and at the end ``results.csv``, ``best.yaml``, ``best_run/``, ``summary.json`` and
``report/``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray import tune
from ray.tune import (
    CheckpointConfig,
    ExperimentAnalysis,
    FailureConfig,
    PlacementGroupFactory,
    RunConfig,
    TuneConfig,
    Tuner,
)
from ray.tune.error import TuneError

from distmeta.adaptation import evaluate
from distmeta.components import explain, nearest
from distmeta.config import load, read_yaml
from distmeta.distributed.cluster import check_room, connect
from distmeta.distributed.executor import InProcess
from distmeta.errors import ConfigError, DistmetaError, RunError, Stopped, WorkerError, one_line
from distmeta.evaluation import describe, evaluate_tasks, finals
from distmeta.experiment import assemble
from distmeta.mirror import is_url
from distmeta.runs import RunFolder, storage_errors
from distmeta.stopping import StopSignal
from distmeta.tune.files import load_search
from distmeta.tune.live import Live, name_of
from distmeta.tune.report import settings_text, write_report
from distmeta.tune.results import STATES, Group, front_of, groups_of, table_csv, trials_of, winner_of
from distmeta.tune.search import Search
from distmeta.tune.strategies import make_scheduler, make_searcher
from distmeta.tune.trial import COSTS, resources, run_trial

log = logging.getLogger("distmeta")


def search(source: str | Path | Mapping[str, Any], *changes: str) -> Path:
    """Searches meta-hyperparameters.

    Args:
        source: A name of ``tune_configs/``, a YAML file, or a mapping.
        changes: ``"key=value"`` strings that change it.

    Returns:
        The folder of the search.

    Raises:
        DistmetaError: See `distmeta.errors`. All settings are checked before any trial is started.
        Stopped: SIGINT or SIGTERM came; the search can be resumed.
    """
    settings = load_search(source, changes)
    if settings.run_dir is not None and is_url(settings.run_dir):
        raise ConfigError(f"run_dir: a search needs a folder that all its nodes see; given: {settings.run_dir}")
    run = RunFolder.new(settings)
    _check_metrics(settings)
    loggers = _loggers(settings)
    with run.lock(), _cluster(settings):
        run.refuse_used()
        run.write("search.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        tuner = Tuner(
            _trainable(settings),
            param_space=settings.parsed.domains()
            | ({"seed": tune.grid_search(settings.seeds)} if settings.seeds else {}),
            tune_config=TuneConfig(
                metric=None if isinstance(settings.metric, list) else settings.metric,
                mode=None if isinstance(settings.mode, list) else settings.mode,
                search_alg=make_searcher(settings),
                scheduler=make_scheduler(settings),
                num_samples=settings.samples,
                time_budget_s=settings.seconds,
                trial_dirname_creator=name_of,
            ),
            run_config=RunConfig(
                name="trials",
                storage_path=str(run.path),
                verbose=0,
                callbacks=[Live(settings), *loggers],
                failure_config=FailureConfig(max_failures=settings.max_failures),
                # Population based training takes over checkpoints of other trials, which must not be removed meanwhile.
                checkpoint_config=CheckpointConfig(num_to_keep=None if settings.scheduler.use == "pbt" else 2),
            ),
        )
        _fit(tuner, run)
        _conclude(settings, run)
    return run.path


def resume_search(path: str | Path) -> Path:
    """Goes on with a search whose process was stopped or lost; trials that have ended are not run again.

    Tune keeps the state of a search as pickled Python objects: resume no folder that somebody else may have written.

    Raises:
        RunError: There is no search at ``path``, another process is at it, or somebody else owns it.
        Stopped: SIGINT or SIGTERM came; the search can be resumed again.
    """
    run = RunFolder(path)
    file = run.path / "search.yaml"
    if not file.is_file():
        raise RunError(f"{run.path} is not the folder of a search: it holds no search.yaml")
    for part in (run.path, *run.path.glob("trials/*.pkl"), *run.path.glob("trials/*.json")):
        if part.stat().st_uid not in (os.getuid(), 0):
            raise RunError(f"{part} belongs to another user; its state is code as Tune keeps it, and is not loaded")
    try:
        settings = Search.model_validate(read_yaml(file))
    except ValidationError as error:
        raise RunError(f"{file} is damaged: {explain(error, Search)}") from error
    if settings.scheduler.use == "hyperband":
        raise RunError(
            "a search with scheduler.use: hyperband cannot be resumed, since Tune does not keep its brackets; begin it "
            "anew, or take asha"
        )
    state = run.path / "trials"
    with run.lock(), _cluster(settings):
        trainable = _trainable(settings)
        if not Tuner.can_restore(str(state)):
            raise RunError(f"{run.path} has no state to go on from: it was lost before its first trial; start it anew")
        try:
            _mend(state)
            tuner = Tuner.restore(str(state), trainable, resume_errored=True)
        except Exception as error:  # Tune raises what unpickling raises
            raise RunError(f"the state in {state} is damaged ({one_line(error)}); start the search anew") from error
        _fit(tuner, run)
        _conclude(settings, run)
    return run.path


def _mend(state: Path) -> None:
    """Puts the newest sound checkpoint of a trial where the state expects one that is gone.

    Tune removes old checkpoints at once and writes its state every few seconds: when its process is killed between the
    two, the state names a checkpoint that newer ones have replaced.
    """
    for trial in ExperimentAnalysis(str(state)).trials:
        named = Path(trial.checkpoint.path) if trial.checkpoint else None
        if named is None or named.is_dir():
            continue
        newest_first = sorted(named.parent.glob("checkpoint_*"), reverse=True)
        sound = next((folder for folder in newest_first if _is_sound(folder)), None)
        if sound is not None:  # a later one may have been cut off while it was written
            sound.rename(named)


def _is_sound(folder: Path) -> bool:
    try:
        RunFolder.open(folder).checkpoint()
    except DistmetaError:
        return False
    return True


def _check_metrics(search: Search) -> None:
    """Fetches or finds the data, once for all trials, and tries a validation of two tasks.

    Raises:
        ConfigError: It does not give the search's metrics.
    """
    config = search.trial_config(search.parsed.first(), **{"scaling.use_gpu": False})
    experiment = assemble(config)
    vector = experiment.problem.layout.pack(experiment.initial)
    evaluation = evaluate_tasks(InProcess(experiment.problem), experiment.problem, vector, "val", 2, 2)
    known = [*finals(evaluation), *COSTS]
    for metric in search.metrics:
        if metric not in known:
            raise ConfigError(
                f"metric: validation gives no {metric!r}{nearest(metric, known)}; it gives {', '.join(known)}"
            )


class _cluster:
    """Within this context Ray is there, and has room for a trial; a cluster that was started here is stopped."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def __enter__(self) -> None:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C and SIGTERM are ours, see _fit
        os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # reasons stand in the table
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")  # what a search that is lost may have to do again
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        self._owned = not ray.is_initialized()
        factory = resources(self.search)
        if self._owned:
            scaling = self.search.trial_config(self.search.parsed.first()).scaling
            connect(scaling.model_copy(update={"num_workers": "auto"}), log_to_driver=False)
        try:
            driver, *workers = factory.bundles
            if not self.search.autoscaling:
                check_room(driver, workers[0] if workers else {}, len(workers))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        if self._owned:
            ray.shutdown()


def _trainable(search: Search) -> Any:
    factory: PlacementGroupFactory = resources(search)
    return tune.with_resources(tune.with_parameters(run_trial, search=search, path=_path(), home=Path.cwd()), factory)


def _path() -> list[str]:
    return [str(Path(entry).absolute()) for entry in sys.path]  # an empty one is the working directory


def _loggers(search: Search) -> list[Any]:
    """Tune's callbacks for the services of ``log_to``."""
    callbacks: list[Any] = []
    for service in search.log_to:
        if find_spec(service) is None:
            raise ConfigError(f"log_to: {service} is not installed; pip install {service}")
        if service == "wandb":
            from ray.air.integrations.wandb import WandbLoggerCallback

            callbacks.append(WandbLoggerCallback(project="distmeta", group=search.name))
        else:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks.append(MLflowLoggerCallback(experiment_name=search.name, save_artifact=False))
    return callbacks


class _Stop(StopSignal):
    """Asks Tune to save its state and return, by the signal that it listens to for this."""

    notice = "stopping the search, whose state is saved; a second signal ends at once"

    def __enter__(self) -> StopSignal:
        self._tune = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which would end the process by default
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        signal.signal(signal.SIGUSR1, self._tune)

    def _stop(self, number: int, frame: object) -> None:
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:
            raise KeyboardInterrupt  # Tune does not listen yet, or no longer
        super()._stop(number, frame)
        signal.raise_signal(signal.SIGUSR1)


def _fit(tuner: Tuner, run: RunFolder) -> None:
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it says of trials stands in the table
    with _Stop() as stop:
        try:
            tuner.fit()
        except TuneError as error:
            raise WorkerError(f"Tune has failed: {one_line(error)}; `distmeta tune --resume {run.path}`") from error
    if stop.requested:
        raise Stopped(f"stopped; `distmeta tune --resume {run.path}` goes on with it")


def _conclude(search: Search, run: RunFolder) -> None:
    """Writes what has come out: table, best configuration, the winner's test, report."""
    trials = trials_of(run.path / "trials", search)
    groups = groups_of(trials, search)
    winner = winner_of(groups)
    run.write("results.csv", table_csv(trials, search))
    counts = {state: sum(trial.state == state for trial in trials) for state in STATES}
    summary: dict[str, Any] = {
        "trials": len(trials),
        **counts,
        "seconds_of_training": sum(trial.seconds for trial in trials),
        "outer_steps": sum(trial.step for trial in trials),
        "outer_steps_without_pruning": sum(search.trial_config(trial.sample).train.steps for trial in trials),
    }
    if winner is None:
        run.write("summary.json", json.dumps(summary, indent=2))
        raise WorkerError(f"no trial has a score; their reasons stand in {run.path / 'results.csv'}")
    summary["best"] = _best(search, run, winner)
    if len(search.metrics) > 1:
        summary["pareto_front"] = [[t.name for t in group.trials] for group in front_of(groups, search)]
    run.write("summary.json", json.dumps(summary, indent=2))
    page = write_report(search, run, trials, summary)
    _say(search, run, summary, winner, page)


def _best(search: Search, run: RunFolder, winner: Group) -> dict[str, Any]:
    """Writes ``best.yaml`` and ``best_run/``, and judges the winner on test tasks if the search says so."""
    trial = winner.trials[0]
    settings = search.winner(trial.sample)
    about = f"# The best of the search {search.name}; `distmeta train {run.path / 'best.yaml'}` trains it\n"
    best_yaml = settings | {"name": f"{settings['name'] or search.name}-tuned", "run_dir": None}
    run.write("best.yaml", about + yaml.safe_dump(best_yaml, sort_keys=False, allow_unicode=True))
    best: dict[str, Any] = {
        "trials": [t.name for t in winner.trials],
        "settings": search.parsed.settings(trial.sample),
        "validation": {
            "metric": search.metrics[0],
            "mean": winner.mean,
            "standard_deviation_over_seeds": winner.spread,
        },
    }
    folder = run.path / "best_run"
    if trial.folder is not None and Path(trial.folder).is_dir():
        with storage_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(trial.folder, folder)
        config = load(settings | {"run_dir": str(folder)})
        RunFolder(folder).write_config(config)
        if search.test and config.evaluation.tasks:
            best["test"] = evaluate(folder)
    return best


def _say(search: Search, run: RunFolder, summary: dict[str, Any], winner: Group, page: Path) -> None:
    best = summary["best"]
    counts = ", ".join(f"{summary[state]} {state}" for state in STATES if summary[state])
    print(f"{summary['trials']} trials: {counts}")
    settings = settings_text(best["settings"])
    spread = f" ± {winner.spread:.4f} over seeds" if len(winner.trials) > 1 else ""
    validation = f"validation {search.metrics[0]} {winner.mean:.4f}{spread}"
    print(f"best     {', '.join(best['trials'])}: {validation} with {settings}")
    if "test" in best:
        print(f"test     {describe(best['test'])} on {best['test']['tasks']} unseen tasks, evaluated once")
    print(f"config   {run.path / 'best.yaml'}\ntable    {run.path / 'results.csv'}\nreport   {page}")

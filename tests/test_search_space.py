"""Search spaces and the files of searches: what they mean, and one clear line for what is wrong in them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search.variant_generator import generate_variants
from typer.testing import CliRunner

from distmeta import config
from distmeta.cli import app
from distmeta.config import load
from distmeta.experiment import assemble, complete
from distmeta.tune.files import load_search
from distmeta.tune.packaged import searches
from distmeta.tune.results import Trial, groups_of, winner_of
from distmeta.tune.space import Space

BASE = {
    "tasks": {"use": "problems:Blobs"},
    "model": {"use": "mlp", "hidden": [8]},
    "algorithm": {"use": "maml", "inner_lr": 0.1},
    "outer": {"lr": 0.003, "schedule": {"use": "CosineAnnealingLR", "T_max": "${train.steps}"}},
    "train": {"steps": 8, "meta_batch_size": 4, "shard_size": 2},
    "validation": {"every": 2, "tasks": 20},
    "evaluation": {"tasks": 40},
}
RATE = {"outer.lr": {"loguniform": [1e-3, 1e-1]}}


def test_the_packaged_searches_are_those_of_tune_configs() -> None:
    root = Path(__file__).resolve().parents[1] / "tune_configs"
    assert set(searches()) == {path.stem for path in root.glob("*.yaml")} >= {"glyphs", "omniglot", "sinusoid"}


@pytest.mark.parametrize("name", sorted(searches()))
def test_whatever_a_packaged_search_draws_can_be_trained(name: str) -> None:
    search = load_search(name)
    generator = np.random.default_rng(7)
    for _ in range(8):
        ((_, sample),) = list(
            generate_variants({k: _one(v) for k, v in search.parsed.domains().items()}, random_state=generator)
        )
        trial = search.trial_config(sample)
        assemble(trial, prepare=False)
        winner = load(search.winner(sample))
        assert complete(winner).algorithm == complete(trial).algorithm
        assert winner.evaluation.tasks > 0
        assert {key for key, _ in _flat(search.winner(sample))} >= set(search.parsed.settings(sample))


def _one(domain):
    from ray import tune

    return tune.choice(domain["grid_search"]) if isinstance(domain, dict) else domain


def _flat(settings, prefix=""):
    for key, value in settings.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def test_conditional_dimensions_count_only_where_they_are_chosen() -> None:
    search = load_search({
        "base": BASE,
        "space": {
            "choice": {
                "sgd": {"outer": {"use": "SGD", "lr": {"uniform": [0.1, 1]}, "schedule": None}},
                "adam": {"outer.lr": {"loguniform": [1e-4, 1e-2]}, "algorithm": {"inner_steps": {"choice": [1, 2]}}},
            },
            "model.hidden": {"choice": [[4], [4, 4]]},
        },
    })  # fmt: skip
    labels = [dimension.label for dimension in search.parsed.dimensions]
    assert labels == [
        "choice", "choice[sgd].outer.lr", "choice[adam].outer.lr", "choice[adam].algorithm.inner_steps", "model.hidden",
    ]  # fmt: skip
    sample = dict(zip(labels, ["sgd", 0.5, 0.005, 2, "[4, 4]"], strict=True))
    settings = {"outer.use": "SGD", "outer.lr": 0.5, "outer.schedule": None, "model.hidden": [4, 4]}
    assert search.parsed.settings(sample) == settings
    one, other = search.trial_config(sample), search.trial_config(sample | {"choice": "adam"})
    assert (one.outer.use, one.outer.lr, one.outer.schedule) == ("SGD", 0.5, None)
    assert (other.outer.use, other.outer.lr, other.algorithm.options["inner_steps"]) == ("Adam", 0.005, 2)
    assert one.algorithm.options == {"inner_lr": 0.1}
    assert other.outer.schedule.options == {"T_max": 8}
    assert search.winner(sample | {"choice": "adam"})["outer"]["schedule"]["T_max"] == "${train.steps}"


@given(low=st.floats(1e-6, 1e3), ratio=st.floats(1.01, 1e4), share=st.floats(0, 1))
def test_drawn_numbers_survive_the_way_into_a_configuration(low: float, ratio: float, share: float) -> None:
    search = Space({"outer.lr": {"loguniform": [low, low * ratio]}})
    value = low * ratio**share
    from distmeta.tune.space import overrides

    assert load(BASE, overrides(search.settings({"outer.lr": value}))).outer.lr == value


def test_an_override_of_a_schedule_drops_the_options_of_the_one_before() -> None:
    changed = load(BASE, ["outer.schedule.use=ExponentialLR", "outer.schedule.gamma=0.9"])
    assert changed.outer.schedule.options == {"gamma": 0.9}
    assert config.merge(BASE, ["train.steps=3"])["outer"]["schedule"]["T_max"] == "${train.steps}"


def test_settings_of_all_trials_can_be_changed_however_they_are_written() -> None:
    for written in ({"train.steps": 4}, {"train": {"steps": 4}}):
        search = load_search({"base": BASE, "space": RATE, "set": written}, ["set.train.steps=6", "set.seed=5"])
        trial = search.trial_config({"outer.lr": 0.01})
        assert (trial.train.steps, trial.seed) == (6, 5)
    assert load_search({"base": BASE | {"seed": 7}, "space": RATE}).trial_config({"outer.lr": 0.01}).seed == 7


def test_probes_are_the_bounds_that_can_be_drawn() -> None:
    space = Space(
        {"a": {"randint": [2, 8]}, "b": {"qrandint": [2, 8, 2]}, "c": {"uniform": [0, 1]}, "d": {"choice": [3]}}
    )
    assert [dimension.probes() for dimension in space.dimensions] == [[2, 7], [2, 8], [0, 1], [3]]


def _trial(name: str, state: str, rate: float, *values: tuple[float, float]) -> Trial:
    """A trial with (accuracy, loss) of each validation, 10 seconds apart."""
    lineage = [
        {"step": step, "metric": "accuracy", "after": {"mean": accuracy},
         "by_inner_step": {"accuracy": [{"mean": accuracy}], "loss": [{"mean": loss}]}}
        for step, (accuracy, loss) in enumerate(values, 1)
    ]  # fmt: skip
    reports = [{"step": step, "seconds": 10.0 * step, "tasks_per_second": 1.0} for step in range(1, len(values) + 1)]
    return Trial(name, {"outer.lr": rate}, state, "", reports, lineage, None)


def test_a_score_is_that_of_the_best_checkpoint_and_a_cost_that_of_the_whole_run() -> None:
    trial = _trial("trial-000", "finished", 0.1, (0.5, 1.0), (0.9, 0.8), (0.8, 0.6))
    assert trial.score("accuracy") == 0.9
    assert trial.score("loss") == 0.8, "of the checkpoint that is kept as the best, which goes by accuracy"
    assert trial.score("seconds") == 30
    assert math.isnan(_trial("trial-001", "failed", 0.1).score("accuracy"))


def test_the_winner_is_the_best_that_was_trained_to_its_end() -> None:
    search = load_search({"base": BASE, "space": {"outer.lr": {"choice": [0.1, 0.2]}}})
    twins = [_trial("trial-000", "finished", 0.1, (0.9, 1.0)), _trial("trial-001", "pruned", 0.1, (0.5, 1.0))]
    others = [_trial("trial-002", "finished", 0.2, (0.6, 1.0)), _trial("trial-003", "pruned", 0.2, (0.95, 1.0))]
    groups = groups_of([*twins, *others], search)
    assert [group.trials[0].name for group in groups] == ["trial-003", "trial-000", "trial-002", "trial-001"]
    winner = winner_of(groups)
    assert winner is not None and [trial.name for trial in winner.trials] == ["trial-000"]
    assert winner_of(groups_of([_trial("trial-000", "failed", 0.1)], search)) is None


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


TABLE = {
    # what is wrong: (keys of the search's file that differ, what the message says)
    "unknown key": ({"sapce": {}}, "sapce: unknown key; did you mean 'space'?"),
    "no space": ({"space": None}, "space: input should be settings, {key: value}"),
    "empty space": ({"space": {}}, "space: empty; give at least one setting with a distribution"),
    "key that does not exist": (
        {"space": {"outer.lrr": {"uniform": [0, 1]}}},
        "space.outer.lrr = 0: outer.lrr: unknown key; did you mean 'lr'?",
    ),
    "option that does not exist": (
        {"space": {"algorithm.inner_lrr": {"uniform": [0, 1]}}},
        "unknown key; did you mean 'inner_lr'?",
    ),
    "unknown distribution": ({"space": {"outer.lr": {"logunifrom": [1, 2]}}}, "did you mean 'loguniform'?"),
    "constant": ({"space": {"outer.lr": 0.1}}, "space.outer.lr: 0.1 is no distribution"),
    "bounds reversed": (
        {"space": {"outer.lr": {"uniform": [1, 0]}}},
        "takes [lower, upper] with lower < upper; given: [1, 0]",
    ),
    "log of 0": ({"space": {"outer.lr": {"loguniform": [0, 1]}}}, "with lower > 0; given: [0, 1]"),
    "too few arguments": ({"space": {"outer.lr": {"uniform": [1]}}}, "uniform takes [lower, upper]; given: [1]"),
    "no numbers": ({"space": {"outer.lr": {"uniform": ["a", "b"]}}}, "finite numbers; given: ['a', 'b']"),
    "fractions": ({"space": {"algorithm.inner_steps": {"randint": [1, 2.5]}}}, "whole numbers; given: [1, 2.5]"),
    "out of range": (
        {"space": {"outer.lr": {"uniform": [-1, 1]}}},
        "space.outer.lr = -1: outer.lr: input should be greater than 0",
    ),
    "one bad value": (
        {"space": {"algorithm.use": {"choice": ["maml", "mmaml"]}}},
        "space.algorithm.use = 'mmaml': algorithm.use: 'mmaml' is not known; did you mean 'maml'?",
    ),
    "bad alternative": (
        {"space": {"algorithm": {"choice": {"a": {"use": "imaml", "cg_step": 3}}}}},
        "space.algorithm = 'a': algorithm.cg_step: unknown key; did you mean 'cg_steps'?",
    ),
    "same value twice": (
        {"space": {"outer.lr": {"choice": [1, 1]}}},
        "space.outer.lr: two values of this choice are the same",
    ),
    "no values": (
        {"space": {"outer.lr": {"choice": []}}},
        "choice takes a list of values, or alternatives by name; given: []",
    ),
    "values at the top": (
        {"space": {"choice": [1, 2]}},
        "at the top of the space, choice takes alternatives that are mappings",
    ),
    "set twice": (
        {"space": {**RATE, "choice": {"a": {"outer.lr": 0.1}}}},
        "space: outer.lr is set twice, by choice and by outer.lr",
    ),
    "in set and space": ({"set": {"outer.lr": 0.1}}, "outer.lr stands under set and under space"),
    "seed": (
        {"space": {"seed": {"choice": [1, 2]}}},
        "space.seed: seed is the same for all trials; give seeds: [0, 1, …]",
    ),
    "workers": (
        {"space": {"choice": {"a": {"scaling.num_workers": 3}}}},
        "space.choice: scaling is the same for all trials; write it under set: {scaling.num_workers: …}",
    ),
    "mistake in set": ({"set": {"train.stepz": 5}}, "train.stepz: unknown key; did you mean 'steps'?"),
    "mistake in base": (
        {"base": "glyphs-5way-1shot-mamm"},
        "no packaged configuration 'glyphs-5way-1shot-mamm'; did you mean",
    ),
    "auto workers": ({"set": {"scaling.num_workers": "auto"}}, "a trial needs a number of workers"),
    "never validated": ({"set": {"validation.every": 0}}, "validation.every must divide train.steps"),
    "last step not validated": (
        {"set": {"validation.every": 3}},
        "validation.every must divide train.steps, so that each trial ends with a validation; they are 3 and 8",
    ),
    "budgets differ": (
        {"space": {"train.steps": {"choice": [4, 8]}}, "scheduler": {"use": "asha"}},
        "train.steps differs between trials",
    ),
    "unknown searcher": (
        {"searcher": {"use": "optima"}},
        "searcher.use: 'optima' is not known; did you mean 'optuna'?",
    ),
    "unknown scheduler": ({"scheduler": {"use": "ashaa"}}, "scheduler.use: 'ashaa' is not known; did you mean 'asha'?"),
    "scheduler option": (
        {"scheduler": {"use": "asha", "grce": 5}},
        "scheduler.grce: unknown key; did you mean 'grace'?",
    ),
    "grace too long": (
        {"scheduler": {"use": "asha", "grace": 50}},
        "scheduler.grace must be at most train.steps = 8; given: 50",
    ),
    "reduction of 1": (
        {"scheduler": {"use": "asha", "reduction_factor": 1}},
        "scheduler.reduction_factor must be a number above 1; given: 1",
    ),
    "grid with optuna": (
        {"space": {"outer.lr": {"grid_search": [0.1]}}, "searcher": {"use": "optuna"}},
        "optuna takes no grid_search; write choice instead",
    ),
    "normal with optuna": (
        {"space": {"outer.clip_norm": {"randn": [50, 1]}}, "searcher": {"use": "optuna"}},
        "optuna takes no randn",
    ),
    "metrics without optuna": (
        {"metric": ["accuracy", "seconds"], "mode": ["max", "min"]},
        "several at once need searcher.use: optuna and scheduler.use: none",
    ),
    "modes missing": ({"metric": ["accuracy", "seconds"], "mode": "max"}, "mode: give one max or min for each metric"),
    "unknown metric": ({"metric": "acuracy"}, "metric: validation gives no 'acuracy'; did you mean 'accuracy'?"),
    "seeds with asha": (
        {"seeds": [0, 1], "scheduler": {"use": "asha"}},
        "seeds: several need searcher.use: random and scheduler.use: none",
    ),
    "pbt of nothing": (
        {"scheduler": {"use": "pbt", "mutate": ["outer.l"]}},
        "scheduler.mutate: outer.l is no key of the space; did you mean 'outer.lr'?",
    ),
    "pbt of a shape": (
        {"space": {"model.hidden": {"choice": [[4], [8]]}}, "scheduler": {"use": "pbt"}},
        "model.hidden cannot change in a live run",
    ),
    "pbt of a start": (
        {
            "space": {"algorithm": {"choice": {"a": {"use": "meta-sgd", "inner_lr": {"uniform": [0.1, 1]}}}}},
            "scheduler": {"use": "pbt", "mutate": ["algorithm[a].inner_lr"]},
        },
        "sets where meta-parameters start from; in a live run it would have no effect",
    ),
    "pbt of a scheduled rate": (
        {"scheduler": {"use": "pbt"}},
        "scheduler.mutate: outer.lr follows outer.schedule; write set: {outer.schedule: null}",
    ),
    "pbt with optuna": (
        {"scheduler": {"use": "pbt"}, "searcher": {"use": "optuna"}},
        "searcher: pbt draws and changes values itself; take searcher.use: random with it",
    ),
    "seeds twice": ({"seeds": [1], "set": {"seed": 5}}, "set.seed: seeds stand under seeds"),
    "one seed twice": ({"seeds": [1, 1]}, "seeds: one stands there twice: [1, 1]"),
    "key twice": ({"set": {"train": {"steps": 4}, "train.steps": 8}}, "train.steps stands there twice"),
    "no brackets": ({"scheduler": {"use": "asha", "brackets": 0}}, "scheduler.brackets must be at least 1; given: 0"),
    "quantized logarithm with optuna": (
        {"space": {"algorithm.inner_steps": {"qlograndint": [2, 8, 2]}}, "searcher": {"use": "optuna"}},
        "space.algorithm.inner_steps: optuna takes no qlograndint",
    ),
    "workers of nothing": (
        {"set": {"scaling.num_workers": 1, "scaling.cpus_per_worker": 0}},
        "set.scaling.cpus_per_worker: 0; a trial's workers must be given something to be placed by",
    ),
    "no samples": ({"samples": 0}, "samples: input should be greater than or equal to 1"),
    "service that is not installed": ({"log_to": ["wandb"]}, "log_to: wandb is not installed; pip install wandb"),
    "contradictory resources": (
        {"set": {"scaling.num_workers": 3, "scaling.cpus_per_worker": 10_000}},
        "this cluster can never place a trial: it needs (1 CPU) and 3 times (10000 CPU)",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_a_wrong_search_is_one_line(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    changes, message = TABLE[case]
    if case == "contradictory resources":
        request.getfixturevalue("ray_cluster")
    file, target = tmp_path / "wrong.yaml", tmp_path / "search"
    file.write_text(yaml.safe_dump({"base": BASE, "space": RATE, "samples": 2} | changes))
    result = run("tune", file, f"run_dir={target}")
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not [path for path in target.rglob("*") if path.name != ".lock"], "nothing has been begun"


def test_files_and_folders(tmp_path: Path) -> None:
    cases = {
        ("tune", "glyphss"): "no search 'glyphss'; did you mean 'glyphs'?",
        ("tune", tmp_path / "missing.yaml"): f"no file {tmp_path / 'missing.yaml'}",
        ("tune", "glyphs", "samples"): "'samples' is not an override; give key=value",
        ("tune", "glyphs", "samples=few"): "samples: input should be a valid integer",
        ("tune", "--resume", tmp_path): "is not the folder of a search: it holds no search.yaml",
        ("tune", "glyphs", "--resume", tmp_path): "it takes no 'glyphs' beside it",
    }
    for arguments, message in cases.items():
        result = run(*arguments)
        assert result.exit_code == 2, result.stderr
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "search.yaml").touch()
    result = run("tune", "glyphs", f"run_dir={tmp_path / 'used'}")
    assert result.exit_code == 2
    assert "exists already; `distmeta tune --resume" in result.stderr
    assert run("tune").stdout.startswith("cifar-fs")

"""Bad input: one clear line on standard error, the right exit code, nothing half-written."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from chaos.driver import listens
from click.testing import Result
from typer.testing import CliRunner

from distmeta.cli import app

FAST = ["scaling.num_workers=0", "train.steps=1", "evaluation.tasks=0", "validation.every=0"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


TABLE = {
    # what is wrong: (overrides of the default configuration, what the message says)
    "unknown key": ["train.stepz=3", "train.stepz: unknown key; did you mean 'steps'?"],
    "unknown section": ["trian.steps=3", "trian: unknown key; did you mean 'train'?"],
    "unknown option": ["algorithm.inner_lrr=3", "algorithm.inner_lrr: unknown key; did you mean 'inner_lr'?"],
    "unknown task option": ["tasks.way=3", "tasks.way: unknown key; did you mean 'ways'?"],
    "unknown model option": ["model.filter=3", "model.filter: unknown key; did you mean 'filters'?"],
    "unknown algorithm": ["algorithm.use=mmaml", "'mmaml' is not known; did you mean 'maml'?"],
    "unknown tasks": ["tasks.use=omniglott", "'omniglott' is not known; did you mean 'omniglot'?"],
    "unknown optimizer": ["outer.use=Adm", "outer.use: 'Adm' is not known; did you mean 'Adam'?"],
    "unknown schedule": ["outer.schedule.use=CosineLR", "outer.schedule.use: 'CosineLR' is not known"],
    "schedule option": ["outer.schedule.Tmax=5", "outer.schedule.Tmax: unknown key; did you mean 'T_max'?"],
    "optimizer option": ["outer.options.beta=5", "outer.options.beta: unknown key; did you mean 'betas'?"],
    "optimizer range": ["outer.options.betas=[2,3]", "outer.options: Adam refused its options"],
    "optimizer with closure": ["outer.use=LBFGS", "outer.use: LBFGS evaluates the loss anew"],
    "optimizer of sparse gradients": ["outer.use=SparseAdam", "SparseAdam is for sparse gradients"],
    "unknown loss": ["loss=crossentropy", "'crossentropy' is not known; did you mean 'cross_entropy'?"],
    "no such module": ["tasks.use=no_such_module:Tasks", "cannot be imported: No module named 'no_such_module'"],
    "no such name": ["tasks.use=distmeta.models:Tasks", "cannot be imported"],
    "wrong type": ["train.steps=many", "train.steps: input should be a valid integer"],
    "fraction": ["train.meta_batch_size=1.5", "train.meta_batch_size: input should be a valid integer"],
    "below range": ["train.shard_size=0", "train.shard_size: input should be greater than or equal to 1; given: 0"],
    "negative rate": ["algorithm.inner_lr=-1", "algorithm.inner_lr must be a number above 0; given: -1.0"],
    "infinite rate": ["algorithm.inner_lr=inf", "algorithm.inner_lr must be a number above 0; given: inf"],
    "no steps": ["algorithm.inner_steps=0", "algorithm.inner_steps must be at least 1; given: 0"],
    "not one of": ["model.downsample=average", "model.downsample: input should be 'pool' or 'stride'"],
    "one way": ["tasks.ways=1", "tasks.ways is 1; it must be 2 or more"],
    "too many ways": ["tasks.ways=5000", "fewer than the 5000 ways of a task: lower tasks.ways"],
    "too many shots": ["tasks.shots=20", "examples, fewer than"],
    "option of another model": ["model.use=mlp model.downsample=stride", "model.downsample: unknown key"],
    "negative workers": [
        "scaling.num_workers=-1",
        "num_workers: input should be greater than or equal to 0 or input should be 'auto'; given: -1",
    ],
    "schedule that torch keeps to itself": ["outer.schedule.use=_LRScheduler", "'_LRScheduler' is not known"],
    "schedule by metric": ["outer.schedule.use=ReduceLROnPlateau", "ReduceLROnPlateau follows a metric"],
    "reptile beside Adam": [
        "algorithm.use=reptile",
        "needs plain SGD as outer optimizer, without momentum and not stale; given: Adam",
    ],
    "reptile with momentum": [
        "algorithm.use=reptile outer.use=SGD outer.options.momentum=0.9",
        "needs plain SGD as outer optimizer, without momentum",
    ],
    "one task": ["evaluation.tasks=1", "evaluation.tasks must be at least 2, for there to be an interval, or 0"],
    "no schedule": ["outer.schedule.use=Counter", "'Counter' is not known"],
    "rate twice": ["outer.options.lr=7", "outer.options.lr: set outer.lr instead"],
    "infinite outer rate": ["outer.lr=.inf", "outer.lr: input should be a finite number"],
    "negative size": ["model.use=mlp model.hidden=[-1]", "model: MLP refused its options"],
    "device": ["scaling.workers=1", "scaling.workers: unknown key"],
    "more at least than at most": [
        "scaling.num_workers=2 scaling.min_workers=3",
        "scaling.min_workers = 3 is more than scaling.num_workers = 2",
    ],
    "stale with passes": ["outer.stale=true outer.passes=2", "outer.stale takes one meta-gradient a step"],
    "a value for a section": ["train=5", "train holds settings of its own, as in train.KEY=VALUE; given: 5"],
    "no equals sign": ["steps", "'steps' is not an override; give key=value"],
    "truth for a number": ["train.steps=true", "train.steps: input should be a number; given: True"],
    "truth for a rate": ["algorithm.inner_lr=true", "algorithm.inner_lr: input should be a number; given: True"],
    "environment": ["name=${oc.env:HOME}", "it may refer to its own keys, as ${train.steps} does, and to nothing else"],
    "open brace": ["train={steps:3", "'train={steps:3' cannot be read: "],
    "number for a component": ["outer.schedule=3", "outer.schedule: input should be settings, {use: NAME"],
    "bad interpolation": ["train.steps=${no.such}", "the configuration cannot be read"],
}


@pytest.mark.parametrize("case", TABLE)
def test_a_wrong_setting_is_one_line(case: str, tmp_path: Path) -> None:
    overrides, message = TABLE[case]
    target = tmp_path / "run"
    result = run("train", "glyphs-5way-1shot-maml", *FAST, *overrides.split(" "), f"run_dir={target}")
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not target.exists()


def test_configuration_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    cases = {
        "train: [1,": "cannot be read as YAML",
        "- a\n- b": "must hold a mapping of keys to values; it holds a list",
        "train: {steps: 2}\ntrain: {steps: 3}": "cannot be read as YAML",
        "!!python/object/apply:os.system ['false']": "cannot be read as YAML",
        "\xff": "unknown key",
    }
    for text, message in cases.items():
        broken.write_text(text if text != "\xff" else "ÿ: 1")
        result = run("train", broken)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    broken.write_bytes(b"\xff\xfe\x00")
    assert run("train", broken).exit_code == 2
    missing = run("train", tmp_path / "missing.yaml")
    assert missing.exit_code == 2
    assert "no configuration file" in missing.stderr
    unknown = run("train", "omniglot-5way-1shot-mamll")
    assert "did you mean 'omniglot-5way-1shot-maml'?" in unknown.stderr


def test_data_that_are_missing_or_damaged(tmp_path: Path, omniglot_root: Path) -> None:
    nowhere = "tasks.url=http://127.0.0.1:9"  # the discard port: refused at once
    target = f"run_dir={tmp_path / 'run'}"
    result = run("train", "omniglot-5way-1shot-maml", *FAST, nowhere, f"data_root={tmp_path / 'none'}", target)
    assert result.exit_code == 2
    assert "127.0.0.1:9" in result.stderr
    assert result.stderr.count("\n") == 1

    root = tmp_path / "data" / "omniglot-py"
    root.mkdir(parents=True)
    for name in ("images_background.zip", "images_evaluation.zip"):
        shutil.copy(omniglot_root / "omniglot-py" / name, root)
    archive = root / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-1000])
    result = run("train", "omniglot-5way-1shot-maml", *FAST, f"data_root={root.parent}", target)
    assert result.exit_code == 2
    assert "images_evaluation.zip" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_override_without_a_value_is_no_configuration() -> None:
    done = run("train", "train.steps")
    assert done.exit_code == 2 and "'train.steps' is not an override; give key=value" in done.output


def test_running_statistics_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, outputs, width: int = 4):\n"
        "    norm = nn.BatchNorm1d(width)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), norm, nn.Linear(width, outputs))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run("train", "glyphs-5way-1shot-maml", *FAST, "model={use: 'mine:net'}", "model.filters=4")
    assert "model.filters: unknown key" in result.stderr
    result = run("train", "glyphs-5way-1shot-maml", *FAST, "model.use=mine:net")  # drops the options of conv4
    assert "keeps running statistics" in result.stderr
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"model": {"use": "mine:net", "width": 8}}))
    result = run("train", config, *FAST)
    assert result.exit_code == 2
    assert "layer 2 (BatchNorm1d) keeps running statistics" in result.stderr
    assert "track_running_stats=False" in result.stderr


@pytest.mark.parametrize("command", ["resume", "evaluate", "report"])
def test_a_folder_that_is_no_run(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path)
    assert result.exit_code == 2
    assert "is not the folder of a run" in result.stderr


@pytest.fixture(scope="module")
def glyph_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    result = run("train", *FAST, "model.filters=4", f"run_dir={path}")
    assert result.exit_code == 0, result.stderr
    return path


def test_adapt_refuses_what_it_cannot_use(glyph_run: Path, tmp_path: Path) -> None:
    from PIL import Image

    def folder(name: str, classes: int) -> Path:
        for c in range(classes):
            (tmp_path / name / f"class{c}").mkdir(parents=True)
            picture = Image.new("L", (40, 40), 255)
            picture.paste(0, (10, 5, 14, 35))
            picture.save(tmp_path / name / f"class{c}" / "a.png")
        return tmp_path / name

    good = folder("good", 3)
    many = folder("many", 6)
    broken = folder("broken", 2)
    (broken / "class1" / "a.png").write_bytes(b"no picture")
    empty = folder("empty", 2)
    (empty / "class0" / "a.png").unlink()
    cases = {
        many: "holds 6 classes; this run tells 5 apart",
        broken: "class1/a.png",
        empty: "class0",
        tmp_path / "missing": "missing",
        good / "class0": "class",
    }
    for support, message in cases.items():
        result = run("adapt", glyph_run, "--support", support, "--query", good, "--out", tmp_path / "out")
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert run("adapt", glyph_run, "--support", good, "--query", broken, "--out", tmp_path / "out").exit_code == 2
    assert run("evaluate", glyph_run, "--checkpoint", "77").exit_code == 2
    assert run("evaluate", glyph_run, "--episodes", "0").exit_code == 2
    if not torch.cuda.is_available():
        result = run("evaluate", glyph_run, "--episodes", "2", "scaling.use_gpu=true", "scaling.num_workers=0")
        assert result.exit_code == 2
        assert "torch sees no GPU" in result.stderr


def test_help_and_listings() -> None:
    for command in ("train", "resume", "evaluate", "adapt", "report", "data", "config"):
        assert run(command, "--help").exit_code == 0
    assert "omniglot-5way-1shot-maml" in run("config").stdout
    assert "glyphs" in run("data").stdout
    assert "glyphs is complete" in run("data", "glyphs").stdout
    assert run("data", "glyph").exit_code == 2
    assert run("train", "--bad").exit_code == 2


def test_the_command_line_does_without_torch_until_it_is_needed() -> None:
    code = "import sys, distmeta.cli, distmeta.tune.packaged; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.5)])
def test_a_signal_while_modules_are_loaded_is_one_line(number: int, moment: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distmeta", "train", "sinusoid-maml", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    listens(process)
    time.sleep(moment)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode in (130, -2), errors) == (True, "interrupted\n")
    assert not (tmp_path / "run").exists()

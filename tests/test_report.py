"""Reports of real small runs: what the page says and which pictures it has."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distmeta.core.types import Episode, Split
from distmeta.errors import ConfigError, RunError, StorageError
from distmeta.pictures import running_mean
from distmeta.report import report
from distmeta.runs import RunFolder
from distmeta.training import train

TINY = (
    "scaling.num_workers=0",
    "train.steps=6",
    "train.log_every=1",
    "train.meta_batch_size=2",
    "validation.every=3",
    "checkpoint.every=3",
    "validation.tasks=3",
    "evaluation.tasks=4",
)
ALL = ("learning_curve", "inner_steps", "episode", "throughput")
COMPARED = ("learning_curve", "inner_steps", "throughput")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Two runs on images and one regression."""
    folder = tmp_path_factory.mktemp("runs")
    glyphs = ("glyphs-5way-1shot-maml", *TINY, "model.filters=8", "tasks.queries=3")
    return {
        "glyphs": train(*glyphs, "name=<first> & $best", f"run_dir={folder / 'first'}"),
        "second": train(*glyphs, "name=second", "seed=1", f"run_dir={folder / 'second'}"),
        "sinusoid": train("sinusoid-maml", *TINY, f"run_dir={folder / 'sinusoid'}"),
    }


@pytest.fixture
def copy(runs: dict[str, RunFolder], tmp_path: Path) -> RunFolder:
    """A run that the test may spoil."""
    return RunFolder(shutil.copytree(runs["glyphs"].path, tmp_path / "copy"))


class Page(HTMLParser):
    """The text of a page, its pictures' addresses and all other addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.images, self.links, self.tags, self.open = "", [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "src":
                self.images.append(value)
            if name == "href":
                self.links.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures_of(page: Path) -> set[str]:
    """The names of the page's pictures, each of which is a PNG with something on it."""
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert len(parsed.images) == len(parsed.links)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.images), "nothing is loaded"
    for link in parsed.links:
        with Image.open(page.parent / link) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 300
        assert 0.005 < (pixels < 200).mean() < 0.9, f"{link} is blank"
    return {Path(link).stem for link in parsed.links}


def percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.2f}% ± {100 * value['ci95']:.2f}"


def test_report_of_a_run_is_made_by_training(runs: dict[str, RunFolder]) -> None:
    run = runs["glyphs"]
    page = run.path / "report" / "index.html"
    assert pictures_of(page) == set(ALL)
    text, summary = Page(page).text, run.summary()
    for shown in (summary["test"]["before"], summary["test"]["after"], summary["test"]["inductive"]):
        assert percent(shown) in text
    assert percent(summary["untrained"]["after"]) in text
    assert percent(summary["nearest_neighbour"]) in text
    for shown in ("finished", "maml", "5-way 1-shot", "6 of 6", "(transductive)", "inner_lr: 0.4", "torch"):
        assert shown in text
    assert "<first> & $best" in text
    assert "<first>" not in page.read_text(encoding="utf-8")


def test_comparison(runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = report([runs["glyphs"], runs["second"], runs["second"]])
    assert page.resolve() == (tmp_path / "report" / "index.html").resolve()
    assert pictures_of(page) == set(COMPARED)
    text = Page(page).text
    assert "Comparison of 2 runs" in text, "a run that is given twice counts once"
    for run in (runs["glyphs"], runs["second"]):
        assert percent(run.summary()["test"]["after"]) in text


def test_comparison_of_an_accuracy_with_a_loss(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    page = report([runs["glyphs"], runs["sinusoid"]], tmp_path / "out")
    assert page == tmp_path / "out" / "index.html"
    assert pictures_of(page) == set(COMPARED)


def test_regression(runs: dict[str, RunFolder]) -> None:
    page = report([runs["sinusoid"]])
    assert pictures_of(page) == set(ALL)
    after = runs["sinusoid"].summary()["test"]["after"]
    assert f"{after['mean']:.4f} ± {after['ci95']:.4f}" in Page(page).text
    assert "transductive)" not in Page(page).text


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: dict[str, RunFolder], copy: RunFolder) -> None:
    text = Page(report([runs["glyphs"], copy], copy.path / "both")).text
    assert "Configuration of first" in text
    assert "Configuration of copy" in text


@pytest.mark.parametrize(("lines", "expected"), [(1, {"learning_curve", "throughput"}), (4, set(COMPARED))])
def test_unfinished_run(copy: RunFolder, lines: int, expected: set[str]) -> None:
    (copy.path / "summary.json").unlink()
    kept = copy.metrics.read_text().splitlines(keepends=True)[:lines]
    copy.metrics.write_text("".join(kept) + '{"kind": "tr')  # cut off while it was written
    page = report([copy])
    assert pictures_of(page) == expected | {"episode"}
    assert "unfinished" in Page(page).text


def test_a_run_that_was_trained_and_not_judged_is_not_unfinished(copy: RunFolder) -> None:
    """As the winner of a search."""
    (copy.path / "summary.json").unlink()
    text = Page(report([copy])).text
    assert "trained, not judged on test tasks" in text and "unfinished" not in text


def test_run_without_metrics(copy: RunFolder) -> None:
    for path in (copy.metrics, copy.path / "summary.json"):
        path.unlink()
    shutil.rmtree(copy.checkpoints)
    page = report([copy])
    assert pictures_of(page) == set()
    assert "no metrics yet" in Page(page).text
    assert "holds no checkpoint yet" in Page(page).text


class Steps:
    """Two classes of vectors, an object that no configuration can name."""

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        y = torch.tensor([0, 1])
        x = torch.from_numpy(rng.normal(size=(2, 3))).float()
        return Episode((x, y), (x + 0.1, y))


def test_python_objects(tmp_path: Path) -> None:
    run = train(
        {"loss": "cross_entropy"}, *TINY, f"run_dir={tmp_path / 'python'}", model=nn.Linear(3, 2), tasks=Steps()
    )
    page = run.path / "report" / "index.html"
    assert pictures_of(page) == set(COMPARED)
    assert "only classifications of images" in Page(page).text
    assert "give it again with tasks" in Page(report([run])).text


def test_state_of_torch_and_model_is_left_alone(runs: dict[str, RunFolder]) -> None:
    state = torch.random.get_rng_state()
    report([runs["glyphs"]])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_report_is_the_same_each_time(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    first, second = (report([runs["glyphs"]], tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        report([])
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        report([RunFolder(tmp_path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "nonsense"),
        ("[1]", "no record with a kind"),
        ('{"kind": "other"}', "no record with a kind"),
        ('{"kind": "train", "step": 1}', "loss"),
        ('{"kind": "val", "step": 1}', "metric"),
        ("\udcff", "is damaged"),
    ],
)
def test_damaged_metrics(copy: RunFolder, line: str, message: str) -> None:
    with copy.metrics.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(RunError, match=message):
        report([copy])


@pytest.mark.parametrize("text", ["{", '{"test": 1}', "[1]"])
def test_damaged_summary(copy: RunFolder, text: str) -> None:
    (copy.path / "summary.json").write_text(text)
    with pytest.raises(RunError, match="damaged"):
        report([copy])


def test_damaged_configuration(copy: RunFolder) -> None:
    (copy.path / "config.yaml").write_text("train: {stepz: 1}")
    with pytest.raises(ConfigError, match="stepz"):
        report([copy])


def test_damaged_checkpoint_costs_its_picture_only(copy: RunFolder) -> None:
    for path in copy.checkpoints.glob("*/meta.safetensors"):
        path.write_bytes(b"")
    page = report([copy])
    assert pictures_of(page) == set(COMPARED)
    assert "is damaged" in Page(page).text


def test_page_that_cannot_be_written(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        report([runs["glyphs"]], tmp_path / "file")


def test_many_metrics_are_smoothed(copy: RunFolder) -> None:
    lines = [json.loads(line) for line in copy.metrics.read_text().splitlines()]
    template = next(line for line in lines if line["kind"] == "train")
    rng = np.random.default_rng(0)
    copy.metrics.write_text(
        "".join(
            json.dumps(template | {"step": step, "loss": float(np.exp(-step / 50) * rng.uniform(0.5, 2))}) + "\n"
            for step in range(1, 500)
        )
    )
    assert "learning_curve" in pictures_of(report([copy]))


def test_running_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, 2.0, 4.0])
    np.testing.assert_allclose(running_mean(values, 0), values)
    np.testing.assert_allclose(running_mean(values, 1), [1, 3, 10 / 3, 4, 4])
    np.testing.assert_allclose(running_mean(values, 2), [1, 3, 3, 4, 4])

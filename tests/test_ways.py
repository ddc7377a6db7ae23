"""More classes than in meta-training, for algorithms that make the head from each support set; others refuse them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from problems import Blobs, HeadedMLP
from rich.table import Table
from typer.testing import CliRunner

import distmeta
import distmeta.core.loss
from distmeta import MAML, R2D2, MetaAlgorithm, ProtoMAML, RunFolder
from distmeta.cli import app
from distmeta.core.seeds import stream
from distmeta.errors import ConfigError, DataError, WorkerError
from distmeta.evaluation import describe
from distmeta.figures import figures
from distmeta.models import Conv4

UNTRAINED = ["scaling.num_workers=0", "evaluation.tasks=0", "train.steps=0"]


def glyphs(folder: Path, *more: str, **objects: Any) -> RunFolder:
    settings = UNTRAINED if objects else [*UNTRAINED, "model.filters=4"]
    return distmeta.train("glyphs-5way-1shot-maml", *settings, f"run_dir={folder}", *more, **objects)


@pytest.mark.parametrize("algorithm", ["{use: protomaml, inner_steps: 0}", "{use: protomaml}", "{use: r2d2}"])
def test_a_run_of_five_ways_is_evaluated_as_one_of_ten_would_be(algorithm: str, tmp_path: Path) -> None:
    """What tells ten classes apart is what the body makes of the support set: theta's own head has no part in it."""
    torch.manual_seed(0)
    models = {ways: Conv4((1, 28, 28), ways, filters=32) for ways in (5, 10)}
    models[10].features.load_state_dict(models[5].features.state_dict())
    five, ten = (
        glyphs(tmp_path / str(ways), f"algorithm={algorithm}", f"tasks.ways={ways}", "tasks.queries=3", model=model)
        for ways, model in models.items()
    )
    wide = distmeta.evaluate(five, "tasks.ways=10", episodes=20, model=models[5])
    assert wide["after"] == distmeta.evaluate(ten, episodes=20, model=models[10])["after"]
    assert wide["before"]["mean"] < 0.15 < wide["after"]["mean"]
    mixed = distmeta.evaluate(five, "tasks.ways=[3, 10]", episodes=20, model=models[5])
    assert set(mixed["groups"]) == {"3-way", "10-way"}
    assert models[5].classifier.out_features == 5


def own(folder: Path, algorithm: Any, kind: type[Blobs] = Blobs, **more: Any) -> tuple[RunFolder, dict[str, Any]]:
    torch.manual_seed(0)
    objects = {"model": HeadedMLP(3, 3), "tasks": kind((3,), 3), "algorithm": algorithm} | more
    settings = ["train.steps=3", "scaling.num_workers=0", "validation.every=0", "evaluation.tasks=0"]
    return distmeta.train({}, *settings, f"run_dir={folder}", **objects), objects


def test_a_network_of_ones_own_is_adapted_to_more_classes(tmp_path: Path) -> None:
    run, objects = own(tmp_path / "run", ProtoMAML(inner_steps=0))
    (x, y), (asked, _) = Blobs((3,), 7, 4).sample(stream(0), "test")
    adapted = distmeta.adapt(run, (x, y), **objects)
    trained = objects["model"].body
    trained.load_state_dict(adapted.module.body.state_dict())
    prototypes = torch.stack([trained(x[y == c]).mean(0) for c in range(7)])
    nearest = torch.cdist(trained(asked), prototypes).argmin(1)
    assert torch.equal(adapted.predict(asked).argmax(1), nearest)
    # in plain torch afterwards
    plain = HeadedMLP(3, 7)
    plain.load_state_dict(adapted.module.state_dict())
    assert adapted.module.classifier.out_features == 7 and objects["model"].classifier.out_features == 3
    assert torch.equal(plain(asked), adapted.predict(asked))


def test_steps_from_prototypes_move_the_head_of_more_classes(tmp_path: Path) -> None:
    run, objects = own(tmp_path / "run", ProtoMAML(inner_lr=0.1, inner_steps=3))
    (x, y), _ = Blobs((3,), 7, 4).sample(stream(0), "test")
    still = distmeta.adapt(run, (x, y), **(objects | {"algorithm": ProtoMAML(inner_steps=0)}))
    moved = distmeta.adapt(run, (x, y), **objects)
    loss = lambda adapted: torch.nn.functional.cross_entropy(adapted.predict(x), y)  # noqa: E731
    assert loss(moved) < loss(still)


def test_who_learns_the_head_refuses_more_classes(tmp_path: Path) -> None:
    run, objects = own(tmp_path / "run", MAML(inner_lr=0.1))
    (x, y), _ = Blobs((3,), 7, 4).sample(stream(0), "test")
    with pytest.raises(ConfigError, match=r"the support set has 7 classes; this run tells 3 apart.*protomaml, r2d2"):
        distmeta.adapt(run, (x, y), **objects)
    with pytest.raises(WorkerError, match="adapting to the support set failed: RuntimeError"):
        distmeta.adapt(run, (x[:, :2], y.clamp(max=2)), **objects)
    run = glyphs(tmp_path / "glyphs")
    with pytest.raises(
        ConfigError, match=r"each task has 6 classes; this run tells 5 apart: take fewer, or train with "
    ):
        distmeta.evaluate(run, "tasks.ways=6", episodes=2)


def test_tasks_that_say_nothing_of_their_classes(tmp_path: Path) -> None:
    class Silent(Blobs):
        spec = None

    silent = {"loss": distmeta.core.loss.cross_entropy}
    run, objects = own(tmp_path / "run", R2D2(), kind=Silent, **silent)
    (x, y), _ = Blobs((3,), 7, 4).sample(stream(0), "test")
    assert distmeta.adapt(run, (x, y), **objects).predict(x).shape == (len(x), 7)
    with pytest.raises(ConfigError, match="the support set has the label -1: classes are numbered from 0"):
        distmeta.adapt(run, (x, y - 1), **objects)
    spoken, objects = own(tmp_path / "spoken", R2D2())
    assert distmeta.evaluate(spoken, episodes=4, **(objects | {"tasks": Blobs((3,), 7)}))["after"]["mean"] > 1 / 7


def test_fewer_classes_have_outputs_of_their_own(tmp_path: Path) -> None:
    """As in an evaluation on so many ways: the inner loop, too, knows of no others."""
    run, objects = own(tmp_path / "run", MAML(inner_lr=0.1))
    (x, y), _ = Blobs((3,), 2, 4).sample(stream(0), "test")
    adapted = distmeta.adapt(run, (x, y), **objects)
    assert adapted.predict(x).shape == (len(x), 2)
    before = run.checkpoint().params
    assert torch.equal(adapted.module.classifier.bias[2], before["model.classifier.bias"][2]), "no gradient reaches it"
    assert not torch.equal(adapted.module.classifier.bias[:2], before["model.classifier.bias"][:2])


def test_only_the_splits_that_are_asked_must_have_the_classes(tmp_path: Path) -> None:
    rows = [(f"{word} thing {i}", word) for word in "abcdefghij" for i in range(8)]
    with (tmp_path / "things.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    (tmp_path / "split.json").write_text(json.dumps({"train": list("abcd"), "val": list("ef"), "test": list("ghij")}))
    data = ["tasks.use=text", f"tasks.path={tmp_path / 'things.csv'}", f"tasks.split_file={tmp_path / 'split.json'}"]
    settings = ["tasks.ways=2", "tasks.queries=3", "validation.every=0", *UNTRAINED, f"run_dir={tmp_path / 'run'}"]
    run = distmeta.train("clinc150-5way-1shot-protonet", *data, *settings)
    assert distmeta.evaluate(run, "tasks.ways=4", episodes=4)["tasks"] == 4
    with pytest.raises(DataError, match="the test split of text has 4 classes, fewer than the 5 ways of a task"):
        distmeta.evaluate(run, "tasks.ways=5", episodes=4)


def test_files_of_more_classes(tmp_path: Path) -> None:
    run = glyphs(tmp_path / "run", "algorithm={use: r2d2, ridge: 0.01}")
    for c in range(8):
        (tmp_path / "new" / f"class {c}").mkdir(parents=True)
        blots = stream("blots", c).integers(2, size=(5, 5)) * 255
        Image.fromarray(blots.astype("uint8")).resize((40, 40), Image.Resampling.NEAREST).save(
            tmp_path / "new" / f"class {c}" / "a.png"
        )
    words = ["adapt", run.path, "--support", tmp_path / "new", "--query", tmp_path / "new", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and all(f"p(class {c})" in rows[0] for c in range(8))
    right = sum(row["class"] == row["file"].split("/")[0] for row in rows)
    assert right > 5, "more than there are outputs in training"
    assert len(json.loads((tmp_path / "out" / "classes.json").read_text())) == 8


@pytest.mark.parametrize(
    ("algorithm", "after", "rows"),
    [
        (ProtoMAML(inner_steps=0), "making the head", ["0", "head"]),
        (ProtoMAML(inner_steps=2), "making the head and 2 inner steps", ["0", "head", "1", "2"]),
        (R2D2(), "making the head", ["0", "head"]),
        (MAML(inner_steps=1), "1 inner step", ["0", "1"]),
    ],
)
def test_the_making_of_a_head_is_no_inner_step(
    algorithm: MetaAlgorithm, after: str, rows: list[str], tmp_path: Path
) -> None:
    run, objects = own(tmp_path / "run", algorithm)
    result = distmeta.evaluate(run, episodes=4, **objects)
    line = describe(result)
    assert f"after {after}" in line and f"after {after} and" not in line
    table = next(figures(result))
    assert isinstance(table, Table) and list(table.columns[0].cells) == rows

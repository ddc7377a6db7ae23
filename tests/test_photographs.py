"""Published data sets of photographs (their divisions, on files as they would lie), ResNet-12 and augmentation."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from problems import Blobs, problem_of

from distmeta import MAML, RunFolder, train
from distmeta.core.inner import SGD, last, unroll
from distmeta.core.params import split as split_params
from distmeta.core.seeds import stream
from distmeta.distributed.work import Shard
from distmeta.errors import ConfigError, DataError
from distmeta.models.resnet import DropBlock, ResNet12
from distmeta.tasks.augment import augmented, transform_of
from distmeta.tasks.cifar import FC100
from distmeta.tasks.glyphs import Glyphs
from distmeta.tasks.photographs import CUB, MiniImageNet, TieredImageNet
from distmeta.tasks.splits import SPLITS

SMALL: dict[str, Any] = {"size": 8, "queries": 1}
COUNTS = {"train": 64, "val": 16, "test": 20}


def dot(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey % 256).save(path)


def division(tasks: Any) -> dict[str, list[str]]:
    return {split: [tasks.dataset.names[g] for g in tasks.members[split]] for split in SPLITS}


# data sets


def labels() -> dict[str, list[str]]:
    numbers = iter(range(1, 1000))
    return {split: [f"n{next(numbers):08}" for _ in range(count)] for split, count in COUNTS.items()}


def lists(root: Path) -> dict[str, list[str]]:
    """Ravi and Larochelle's lists: two images a class, the 2nd and the 3rd."""
    (root / "mini_imagenet").mkdir(parents=True, exist_ok=True)
    for split, names in labels().items():
        lines = [f"{name}{k:08}.jpg,{name}" for name in names for k in (2, 3)]
        (root / "mini_imagenet" / f"{split}.csv").write_text("filename,label\n" + "\n".join(lines))
    return labels()


def test_mini_imagenet_by_its_lists(tmp_path: Path) -> None:
    expected = lists(tmp_path)
    tasks = MiniImageNet(data_root=str(tmp_path), **SMALL)
    with pytest.raises(DataError, match=r"200 files that .* names are not in .*; make .*mini_imagenet with train.csv"):
        tasks.prepare()
    for names in expected.values():
        for name in names:
            for k in (2, 3):
                dot(tmp_path / "mini_imagenet" / "images" / f"{name}{k:08}.jpg", int(name[1:]))
    tasks = MiniImageNet(data_root=str(tmp_path), **SMALL)
    tasks.prepare()
    assert division(tasks) == {split: [f"{split}/{name}" for name in names] for split, names in expected.items()}
    assert tasks.describe() == "200 images of 100 classes (train 64, val 16, test 20)"
    assert tasks.card()[0] == "train 64 classes of 2, 128 in all" and "licence: images: ImageNet" in tasks.card()[3]


def test_mini_imagenet_over_imagenet(tmp_path: Path) -> None:
    """The lists number a class's images in the order of the numbers in ImageNet's names, not of the names."""
    expected = lists(tmp_path / "root")
    for names in [*expected.values(), ["n99999999"]]:
        for name in names:
            for number, grey in ((1002, 30), (7, 10), (99, 20)):
                dot(tmp_path / "imagenet" / name / f"{name}_{number}.JPEG", grey)
    tasks = MiniImageNet(data_root=str(tmp_path / "root"), imagenet=str(tmp_path / "imagenet"), **SMALL)
    tasks.prepare()
    assert [len(names) for names in division(tasks).values()] == [64, 16, 20]
    assert tasks.dataset.examples[:2, 0, 0, 0].tolist() == [20, 30], "the 2nd and the 3rd, as the list asks"


def test_mini_imagenet_by_folders(tmp_path: Path) -> None:
    for split, names in labels().items():
        for name in names:
            for k in (0, 1):
                dot(tmp_path / "mini_imagenet" / split / name / f"{k}.jpg", k)
    assert [len(names) for names in division(MiniImageNet(data_root=str(tmp_path), **SMALL)).values()] == [64, 16, 20]
    dot(tmp_path / "mini_imagenet" / "test" / "n77777777" / "0.jpg", 0)
    with pytest.raises(DataError, match="has 64, 16, 21 classes instead of 64, 16, 20 for training, validation and"):
        MiniImageNet(data_root=str(tmp_path), **SMALL).prepare()


def test_tiered_imagenet(tmp_path: Path) -> None:
    numbers = iter(range(1000))
    for split, count in (("train", 351), ("val", 97), ("test", 160)):
        for _ in range(count):
            name = f"n{next(numbers):08}"
            for k in (0, 1):
                dot(tmp_path / "tiered_imagenet" / split / name / f"{k}.png", k)
    tasks = TieredImageNet(data_root=str(tmp_path), **SMALL)
    tasks.prepare()
    assert tasks.describe() == "1,216 images of 608 classes (train 351, val 97, test 160)"


def test_cub(tmp_path: Path) -> None:
    for number in range(1, 201):
        for k in (0, 1):
            dot(tmp_path / "CUB_200_2011" / "images" / f"{number:03}.Bird_{number}" / f"{k}.jpg", number)
    found = division(CUB(data_root=str(tmp_path), **SMALL))
    assert [name[:3] for name in found["train"][:3]] == ["001", "003", "005"] and len(found["train"]) == 100
    assert [name[:3] for name in found["val"][:3]] == ["002", "006", "010"] and len(found["val"]) == 50
    assert [name[:3] for name in found["test"][:3]] == ["004", "008", "012"] and len(found["test"]) == 50


@pytest.mark.parametrize("kind", [MiniImageNet, TieredImageNet, CUB])
def test_what_is_to_be_put_where_is_said(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        kind(data_root=str(tmp_path)).prepare()
    said = str(error.value)
    assert f"{kind(data_root=str(tmp_path)).folder}/" in said and "forbids to download" in said and "\n" not in said


def test_fc100_is_divided_by_superclasses(cifar_root: Path, cifar_source: Path) -> None:
    """Oreshkin et al., 2018: no super-class has classes in two splits, and which are which."""
    coarse = np.load(cifar_source / "labels.npz")["fine_to_coarse"]
    names = json.loads((cifar_source / "classes.json").read_text())["fine_names"]
    tasks = FC100(data_root=str(cifar_root))
    tasks.prepare()
    found = {split: {int(coarse[names.index(name)]) for name in division(tasks)[split]} for split in SPLITS}
    assert found == {
        "train": {1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19}, "val": {8, 11, 13, 16}, "test": {0, 7, 12, 14}
    }  # fmt: skip
    assert [len(tasks.members[split]) for split in SPLITS] == [60, 20, 20]


# ResNet-12


def test_resnet12_is_that_of_the_papers() -> None:
    lee, oreshkin = ResNet12((3, 84, 84), 5), ResNet12((3, 84, 84), 5, widths=(64, 128, 256, 512))
    assert lee.features(torch.rand(2, 3, 84, 84)).shape == (2, 640, 5, 5)
    for net, widths in ((lee, (3, 64, 160, 320, 640)), (oreshkin, (3, 64, 128, 256, 512))):
        expected = widths[-1] * 5 + 5
        for a, b in pairwise(widths):
            expected += 9 * a * b + 2 * 9 * b * b + a * b + 4 * 2 * b  # three convolutions, a projection, four norms
        assert sum(p.numel() for p in net.parameters()) == expected
    assert ResNet12((3, 32, 32), 5, widths=(4, 4, 4, 8), head="flatten").classifier.in_features == 32
    with pytest.raises(ConfigError, match="needs images of 16x16"):
        ResNet12((3, 8, 8), 5)
    with pytest.raises(ConfigError, match=r"model.drop_rate must be from 0"):
        ResNet12((3, 32, 32), 5, drop_rate=1.0)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_second_order_goes_through_resnet12(strategy: str) -> None:
    torch.manual_seed(0)
    model = ResNet12((3, 16, 16), 3, widths=(2, 3, 2, 3)).double()
    steps = 2
    problem, theta = problem_of(
        MAML(inner_lr=0.1, inner_steps=steps), model, Blobs((3, 16, 16), dtype=torch.float64), strategy=strategy
    )
    shard = Shard("train", 0, 0, 2)
    tasks = problem.build(shard)
    gradient = problem.run("meta_gradient", theta, shard).total

    def objective(vector: np.ndarray) -> float:
        params = split_params(problem.layout.unpack(vector)).model
        adapted = [last(unroll(problem.loss, params, task.support, SGD(0.1), steps)).params for task in tasks]
        return sum(float(problem.loss(a, task.query(a))[0]) for a, task in zip(adapted, tasks, strict=True))

    rng, step = np.random.default_rng(0), 1e-6
    for _ in range(4):
        direction = rng.standard_normal(theta.size)
        direction /= np.linalg.norm(direction)
        numeric = (objective(theta + step * direction) - objective(theta - step * direction)) / (2 * step)
        assert gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def test_drop_block() -> None:
    torch.manual_seed(0)
    drop, x = DropBlock(0.2, 3), torch.ones(64, 4, 12, 12)
    y = drop(x)
    gone = (y == 0).float()
    assert 0.12 < float(gone.mean()) < 0.25 and torch.allclose(y.mean((1, 2, 3)), torch.ones(64), atol=1e-5)
    whole = torch.nn.functional.avg_pool2d(gone, 3, stride=1).eq(1).float()
    covered = torch.nn.functional.max_pool2d(torch.nn.functional.pad(whole, [2] * 4), 3, stride=1)
    assert torch.equal(covered, gone), "all that is gone lies in squares of 3 that are gone"
    assert drop.eval()(x) is x


# augmentation

FLIP = {"use": "RandomHorizontalFlip"}
CROP = {"use": "RandomCrop", "size": 28, "padding": 4}


def test_augmentation_is_of_training_tasks_alone_and_from_their_stream() -> None:
    plain, tasks = Glyphs(queries=3), Glyphs(queries=3, augment=(FLIP, CROP))
    for split in SPLITS:
        (x, y), (query, query_y) = plain.sample(stream(1, split), split)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        (x2, y2), (query2, query_y2) = tasks.sample(stream(1, split), split)
        assert torch.equal(before, torch.get_rng_state()), "the global generator is as it was"
        torch.manual_seed(4)
        again = tasks.sample(stream(1, split), split)
        assert torch.equal(x2, again.support_set[0]) and torch.equal(query2, again.query_set[0])
        assert torch.equal(y, y2) and torch.equal(query_y, query_y2)
        same = torch.equal(x, x2) and torch.equal(query, query2)
        assert same == (split != "train")
    flipped = Glyphs(queries=15, augment=(FLIP,)).sample(stream(5), "train").query_set[0]
    straight = Glyphs(queries=15).sample(stream(5), "train").query_set[0]
    turned = [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(flipped, straight, strict=True)]
    assert 15 < sum(turned) < 60, "each image by itself"


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crops_are_windows_of_what_torchvision_pads(mode: Any) -> None:
    from torchvision.transforms.v2 import functional

    x = torch.rand(400, 3, 6, 5)
    crop = {"use": "RandomCrop", "size": [6, 5], "padding": [1, 2], "fill": 0.5, "padding_mode": mode}
    made = augmented(x, transform_of([crop], (3, 6, 5)), stream(7))
    padded = functional.pad(x, [1, 2], fill=0.5, padding_mode=mode)
    windows = padded.unfold(2, 6, 1).unfold(3, 5, 1)  # by image, channel, top and left
    same = (windows == made[:, :, None, None]).all((1, 4, 5))
    assert same.flatten(1).sum(1).eq(1).all(), "each is one window of its own image"
    counts = same.sum(0)
    assert counts.shape == (5, 3) and counts.min() >= 10, "and each window is as likely as the others"
    assert counts.max() <= 50


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ([{"use": "RandomFlip"}], "torchvision.transforms.v2 has no 'RandomFlip'; did you mean"),
        ([{"use": "RandomCrop", "sizes": 3}], "RandomCrop refused its arguments"),
        ([{"use": "RandomCrop", "size": 20}], r"makes torch.float32 \(1, 20, 20\) of images \(1, 28, 28\)"),
        ([{"use": "RandomCrop", "size": 40}], r"cannot be applied to images \(1, 28, 28\)"),
        ([{"size": 28}], r"is a list of \{use: Transform"),
    ],
)
def test_transforms_that_cannot_be_are_refused(augment: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Glyphs(augment=tuple(augment))


def test_transforms_may_hold_others() -> None:
    choice = {"use": "RandomApply", "p": 0.5, "transforms": [{"use": "ColorJitter", "brightness": 0.5}]}
    x = Glyphs(queries=15, augment=(choice,)).sample(stream(2), "train").query_set[0]
    plain = Glyphs(queries=15).sample(stream(2), "train").query_set[0]
    changed = [not torch.equal(a, b) for a, b in zip(x, plain, strict=True)]
    assert 15 < sum(changed) < 60


def test_augmented_runs_have_the_same_bits_on_any_layout(tmp_path: Path, ray_cluster: None) -> None:
    settings = ["tasks.queries=2", "train.steps=2", "train.meta_batch_size=3", "train.shard_size=1", "model.filters=4"]
    settings += ["evaluation.tasks=0", "validation.every=0"]
    parts = {"tasks": {"use": "glyphs", "augment": [FLIP, CROP]}, "model": {"use": "conv4"}}
    found = []
    for workers in (0, 2):
        run = train(
            {**parts, "algorithm": {"use": "maml"}},
            *settings,
            f"scaling.num_workers={workers}",
            f"run_dir={tmp_path / str(workers)}",
        )
        found.append(RunFolder.open(run.path).checkpoint().params)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

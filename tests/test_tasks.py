"""Few-shot tasks: sampling, the cache, sinusoids."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.seeds import stream
from distmeta.core.types import Episode, Split, TaskSpec
from distmeta.errors import ConfigError, DataError, StorageError
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.files import atomic_write, cache_dir, default_data_root
from distmeta.tasks.images import FewShotImages
from distmeta.tasks.sinusoid import Sinusoid
from distmeta.tasks.splits import SPLITS

COUNTS = (6, 7, 9)  # of the classes 0, 1, 2, 3, 4, ... in turn
CLASSES = 24


@dataclass(eq=False)
class Numbered(FewShotImages):
    """Images that say who they are: the corner pixels hold the class and the example, and the orientation shows."""

    version: str = "1"

    name: ClassVar[str] = "numbered"
    image_shape: ClassVar[tuple[int, int, int]] = (1, 4, 4)
    built: ClassVar[int] = 0

    def source_key(self) -> str:
        return self.version

    def build(self) -> ExampleSet:
        Numbered.built += 1
        counts = np.array([COUNTS[number % 3] for number in range(CLASSES)])
        pixels = np.zeros((counts.sum(), 4, 4), np.uint8)
        pixels[:, 0, 0] = np.repeat(np.arange(CLASSES), counts)
        pixels[:, 0, 1] = np.concatenate([np.arange(count) for count in counts])
        pixels[:, 0, 2] = 255
        return ExampleSet(pixels, tuple(f"class{number}" for number in range(CLASSES)), counts)

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        first = SPLITS.index(split)
        return np.arange(first, len(names), 3)


def identities(x: Tensor) -> list[tuple[int, int, int]]:
    """(class, example, turn) of each of the images of `Numbered`."""
    found: list[tuple[int, int, int]] = []
    for image in np.rint(x[:, 0].numpy() * 255).astype(int):
        turn = next(turn for turn in range(4) if np.rot90(image, -turn)[0, 2] == 255)
        upright = np.rot90(image, -turn)
        found.append((upright[0, 0], upright[0, 1], turn))
    return found


def flat(episode: Episode) -> list[Tensor]:
    return [*episode.support_set, *episode.query_set]


@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_episode(split: Split, rotations: bool) -> None:
    tasks = Numbered(ways=5, shots=2, queries=3, train_shots=1, train_queries=4, rotations=rotations)
    shots, queries = (1, 4) if split == "train" else (2, 3)
    members = set(tasks.split_groups([""] * CLASSES, split).tolist())
    turns: set[int] = set()
    for index in range(30):
        (x, y), (query_x, query_y) = tasks.sample(stream("episode", index), split)
        assert x.shape == (5 * shots, 1, 4, 4) and query_x.shape == (5 * queries, 1, 4, 4)
        assert x.dtype == query_x.dtype == torch.float32 and y.dtype == query_y.dtype == torch.int64
        assert x.min() >= 0 and x.max() == 1
        assert torch.bincount(y).tolist() == [shots] * 5 and torch.bincount(query_y).tolist() == [queries] * 5
        support, query = identities(x), identities(query_x)
        assert len({*support, *query}) == 5 * (shots + queries), "an example came twice"
        # each label stands for one (class, rotation), the same in support and query, and no two labels for the same
        by_label = {int(label): (who[0], who[2]) for label, who in zip(y, support, strict=True)}
        assert len(set(by_label.values())) == 5
        for label, who in [*zip(y, support, strict=True), *zip(query_y, query, strict=True)]:
            assert by_label[int(label)] == (who[0], who[2])
        assert {who[0] for who in support} <= members
        turns |= {who[2] for who in support}
    assert turns == (set(range(4)) if rotations else {0})


def test_same_stream_same_episode_whatever_came_before() -> None:
    tasks, other = Numbered(shots=2, queries=3, rotations=True), Numbered(shots=2, queries=3, rotations=True)
    other.sample(stream("something else"), "test")
    np.random.seed(1)
    torch.manual_seed(1)
    first = tasks.sample(stream(7, "train", 3), "train")
    np.random.seed(2)
    torch.manual_seed(2)
    again = other.sample(stream(7, "train", 3), "train")
    different = tasks.sample(stream(8, "train", 3), "train")
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(flat(first), flat(different), strict=True))


def test_support_is_in_random_order_and_all_is_drawn() -> None:
    tasks = Numbered(ways=4, shots=2, queries=1)
    episodes = [tasks.sample(stream("order", index), "val") for index in range(200)]
    assert len({tuple(episode.support_set[1].tolist()) for episode in episodes}) > 100
    seen = {
        who[:2] for episode in episodes for x in (episode.support_set[0], episode.query_set[0]) for who in identities(x)
    }
    assert len(seen) == sum(COUNTS[number % 3] for number in range(1, CLASSES, 3))


def test_episodes_are_their_own_memory() -> None:
    tasks = Numbered(ways=2, queries=1)
    episode = tasks.sample(stream(0), "train")
    before = tasks.dataset.examples.copy()
    for tensor in flat(episode):
        tensor.fill_(0)
    assert np.array_equal(before, tasks.dataset.examples)
    with pytest.raises(ValueError, match="read-only"):
        tasks.dataset.examples[0] = 0


def test_pickle_carries_no_data() -> None:
    tasks = Numbered(queries=3)
    tasks.prepare()
    blob = pickle.dumps(tasks)
    assert len(blob) < 2000
    copy: Numbered = pickle.loads(blob)
    assert "dataset" not in copy.__dict__
    first, again = tasks.sample(stream(1), "val"), copy.sample(stream(1), "val")
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))


def test_spec() -> None:
    assert Numbered(ways=7).spec == TaskSpec((1, 4, 4), 7, "cross_entropy")
    assert Sinusoid().spec == TaskSpec((1,), 1, "mse")


# the cache


def truncate(folder: Path) -> None:
    path = next(folder.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("*.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty_array(folder: Path) -> None:
    next(folder.glob("*.npy")).write_bytes(b"")


def break_index(folder: Path) -> None:
    next(folder.glob("*.json")).write_text("[1, 2")


def foreign_index(folder: Path) -> None:
    next(folder.glob("*.json")).write_text("[]")


def lose_index(folder: Path) -> None:
    next(folder.glob("*.json")).unlink()


def lose_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, empty_array, break_index, foreign_index, lose_index, lose_all]
)
def test_damaged_cache_is_built_anew(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path))
    tasks = Numbered(queries=3)
    tasks.prepare()
    expected, built = flat(tasks.sample(stream(3), "train")), Numbered.built
    Numbered(queries=3).prepare()
    assert Numbered.built == built, "a sound cache was not used"
    damage(tmp_path)
    copy: Numbered = pickle.loads(pickle.dumps(tasks))
    found = flat(copy.sample(stream(3), "train"))
    assert Numbered.built == built + 1
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]


def test_another_key_is_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path))
    for version in ("1", "2", "2"):
        Numbered(queries=3, version=version).prepare()
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot write .*numbered"):
        Numbered(queries=3).prepare()


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_folders_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTMETA_DATA", "~/mine")
    monkeypatch.setenv("DISTMETA_CACHE", "/a/cache")
    assert default_data_root() == tmp_path / "mine" and cache_dir() == Path("/a/cache")
    monkeypatch.delenv("DISTMETA_DATA")
    monkeypatch.delenv("DISTMETA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_data_root() == tmp_path / ".cache/distmeta/data" and cache_dir() == Path("/xdg/distmeta")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache/distmeta"


# mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Numbered(ways=1), r"tasks.ways is 1; it must be 2 or more"),
        (lambda: Numbered(shots=0), r"tasks.shots is 0; it must be 1 or more"),
        (lambda: Numbered(queries=-1), r"tasks.queries is -1"),
        (lambda: Numbered(train_shots=0), r"tasks.train_shots is 0"),
        (lambda: Numbered(train_queries=0), r"tasks.train_queries is 0"),
        (lambda: Sinusoid(shots=0), r"tasks.shots is 0"),
        (lambda: Sinusoid(test_queries=0), r"tasks.test_queries is 0"),
        (lambda: Sinusoid(noise=-0.1), r"tasks.noise is -0.1"),
        (lambda: Sinusoid(noise=float("nan")), r"tasks.noise is nan"),
    ],
)
def test_settings_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            Numbered(ways=9, queries=1),
            "the train split of numbered has 8 classes, fewer than the 9 ways of a task: lower tasks.ways",
        ),
        (Numbered(ways=33, queries=1, rotations=True), r"32 classes \(rotations counted\), fewer than the 33 ways"),
        (
            Numbered(queries=6),
            r"class class0 of numbered \(train\) has 6 examples, fewer than 1 shots \+ 6 queries: lower "
            r"tasks.shots or tasks.queries",
        ),
        (Numbered(queries=1, train_shots=6), r"fewer than 6 shots \+ 1 queries: lower tasks.train_shots"),
        (Numbered(queries=8, train_queries=2), r"class class1 of numbered \(val\) has 7 examples"),
    ],
)
def test_too_little_data(tasks: Numbered, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tasks.prepare()
    of: Split = "val" if "val" in message else "train"
    with pytest.raises(DataError, match=message):
        tasks.sample(stream(0), of)


@pytest.mark.parametrize("split", SPLITS)
def test_sinusoid(split: Split) -> None:
    tasks = Sinusoid(shots=5, queries=7, test_queries=50)
    for index in range(50):
        (x, y), (query_x, query_y) = tasks.sample(stream("sine", index), split)
        assert x.shape == y.shape == (5, 1) and query_x.shape == query_y.shape == (7 if split == "train" else 50, 1)
        assert {tensor.dtype for tensor in (x, y, query_x, query_y)} == {torch.float32}
        # y = a sin x + b cos x, with a = A cos(phase) and b = -A sin(phase): solved by the support, true of the query
        basis, query_basis = torch.cat([x.sin(), x.cos()], 1), torch.cat([query_x.sin(), query_x.cos()], 1)
        a, b = torch.linalg.lstsq(basis.double(), y.double()).solution[:, 0].tolist()
        assert 0.1 - 1e-4 <= np.hypot(a, b) <= 5 + 1e-4 and b <= 1e-4
        assert torch.allclose(query_basis.double() @ torch.tensor([[a], [b]]).double(), query_y.double(), atol=1e-3)
        assert x.abs().max() <= 5


def test_sinusoid_noise_is_on_the_support_only() -> None:
    clean, noisy = (Sinusoid(noise=noise).sample(stream(0), "test") for noise in (0.0, 0.5))
    assert torch.equal(clean.query_set[1], noisy.query_set[1])
    assert 0.05 < (clean.support_set[1] - noisy.support_set[1]).std() < 1.5

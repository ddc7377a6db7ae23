"""No test class is ever trained on: every packaged configuration whose data can be had here, by what is really read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.config import load, packaged
from distmeta.core.seeds import stream
from distmeta.experiment import build_part
from distmeta.tasks import TASKS
from distmeta.tasks.datasets import DataTasks
from distmeta.tasks.splits import SPLITS

ROOTS = {"omniglot": "omniglot_root", "cifar_fs": "cifar_root", "fc100": "cifar_root", "clinc150": "clinc_root"}
BY_HAND = {"cub", "mini_imagenet", "tiered_imagenet", "image_folder", "tabular"}  # tested on files of their own


def distinct() -> dict[str, str]:
    """For each different section ``tasks`` of the packaged configurations that reads data, the name of one that has it;
    tasks that are drawn have no classes."""
    found = {str(load(name).tasks): name for name in sorted(packaged(), reverse=True)}
    uses = {name: load(name).tasks.use for name in sorted(found.values())}
    return {name: use for name, use in uses.items() if issubclass(TASKS[use], DataTasks)}


class Watched(np.ndarray):
    """An array that notes which rows are read."""

    rows: list[np.ndarray]

    def __getitem__(self, index: Any) -> Any:
        self.rows.append(np.unique(index))
        return np.asarray(self)[index]


@pytest.mark.parametrize("name", [name for name, use in distinct().items() if use not in BY_HAND])
def test_no_test_class_is_ever_trained_on(name: str, request: pytest.FixtureRequest) -> None:
    config = load(name)
    root = request.getfixturevalue(ROOTS[config.tasks.use]) if config.tasks.use in ROOTS else None
    tasks = build_part(config, "tasks", data_root=None if root is None else str(root))
    assert isinstance(tasks, DataTasks)
    tasks.prepare()
    whole, starts = tasks.dataset, tasks.dataset.starts
    watched = whole.examples.view(Watched)
    watched.rows = []
    tasks.dataset = dataclasses.replace(whole, examples=watched)
    owner: dict[str, str] = {}  # the split that each class, by its name, has been seen in

    @settings(max_examples=60)
    @given(st.sampled_from(SPLITS), st.integers(0, 2**31), st.integers(0, 10**6))
    def examine(split: Any, seed: int, step: int) -> None:
        watched.rows.clear()
        tasks.sample(stream(seed, split, step, 0), split)
        assert watched.rows, "the episode is made of the data set's rows"
        groups = np.unique(np.searchsorted(starts, np.concatenate(watched.rows), "right") - 1)
        for group in groups:
            assert owner.setdefault(whole.names[group], split) == split, f"{whole.names[group]} is in two splits"

    examine()
    assert set(owner.values()) == set(SPLITS)

"""What the tests share: caches and data in temporary folders, never the user's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from commands import TINY

import distmeta
from distmeta import RunFolder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background: commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "distmeta",
    deadline=None,  # a busy machine is no failure
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("long", hypothesis.settings.get_profile("distmeta"), max_examples=3000)
hypothesis.settings.load_profile("distmeta")


LONGEST = [
    f"test_{name}.py"
    for name in ("tune_survival", "tune", "documents", "layout", "ray_up", "control", "clusters", "stores", "chaos",
                 "jobs", "runs", "compiled", "failures")
]  # fmt: skip
"""The files that take a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with them, so that of two processes none is left with one of them at the end."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches and data roots of the whole session, in the environment so that worker processes have them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DISTMETA_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("RAY_worker_niceness", "0")  # on a busy machine they would come to nothing
        patch.setenv("RAY_local_fs_capacity_threshold", "0.99")  # what Ray says of a disk from 95% on is not ours
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        yield


def _real_data() -> Path:
    """The folder of real data sets: ``$DISTMETA_TEST_DATA``, else ``../shared/data``; skips where there is none."""
    given = os.environ.get("DISTMETA_TEST_DATA")
    source = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (source / "unpack.py").is_file():
        pytest.skip(f"needs the real data sets: there is no {source / 'unpack.py'} (set DISTMETA_TEST_DATA)")
    return source


def _unpacked(name: str, factory: pytest.TempPathFactory) -> Path:
    """A data root with one of the real data sets, as its download would lie."""
    root = factory.mktemp(name)
    subprocess.run([sys.executable, str(_real_data() / "unpack.py"), str(root), name], check=True)
    return root


@pytest.fixture(scope="session")
def omniglot_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the real Omniglot, archives and folders."""
    return _unpacked("omniglot", tmp_path_factory)


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the real CIFAR-100, the binary version."""
    return _unpacked("cifar100", tmp_path_factory)


@pytest.fixture(scope="session")
def cifar_source() -> Path:
    """CIFAR-100 from another hand: a mosaic for each class, and the published split."""
    return _real_data() / "cifar100"


@pytest.fixture(scope="session")
def clinc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the real CLINC150."""
    return _unpacked("clinc150", tmp_path_factory)


@pytest.fixture(scope="session")
def omniglot_lists() -> Path:
    """The folder of the published lists of the split of Vinyals et al."""
    return _real_data() / "omniglot" / "splits"


@pytest.fixture(scope="session")
def ray_cluster(_own_folders: None) -> Iterator[None]:
    """One local Ray cluster for the whole session; pools that find it running join it."""
    import ray
    import torch
    from ray.cluster_utils import Cluster

    # Another Ray on this machine, such as that of a command, waits for seconds where the usual port is taken.
    head: dict[str, Any] = {"num_cpus": 4, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    head |= {"object_store_memory": 2**30, "num_gpus": torch.cuda.device_count()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, logging_level="warning", namespace="distmeta")
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def trained(_own_folders: None, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small run on glyphs, for tests that change nothing of it."""
    return distmeta.train(None, *TINY, f"run_dir={tmp_path_factory.mktemp('runs') / 'glyphs'}")


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """A folder of twelve classes of four pictures."""
    from images_of_things import fill

    return fill(tmp_path / "things", [f"klaß {n}" for n in range(12)])


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Gives the server for the URLs of a protocol (simulated/stores.py), or skips; each is started once."""
    from simulated.stores import STORES

    started = {}

    def server(protocol: str):
        kind = STORES[protocol]
        if kind.needs and shutil.which(kind.needs) is None:
            pytest.skip(f"{protocol}:// is tested against {kind.needs}, which is not installed here")
        if protocol not in started:
            started[protocol] = kind(tmp_path_factory.mktemp(protocol))
        return started[protocol]

    yield server
    for one in started.values():
        one.end()


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Makes this look like a machine that has no working copy of any run."""

    def move() -> None:
        name = f"machine-{time.monotonic_ns()}"
        monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path / name))
        monkeypatch.setattr(socket, "gethostname", lambda: name)

    return move

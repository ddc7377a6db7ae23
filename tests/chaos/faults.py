"""What is done to a training in progress. Each fault returns what it has hit, so that its recovery can be timed."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from .driver import listens

if TYPE_CHECKING:
    from .ordeal import Ordeal

Hit = list[int | str]  # processes of workers, names of runs whose driver was hit


def kill_worker(ordeal: Ordeal) -> Hit | None:
    """SIGKILL to one worker."""
    return _each(ordeal.workers(1), psutil.Process.kill)


def kill_all_workers(ordeal: Ordeal) -> Hit | None:
    """SIGKILL to all workers at once, of all runs."""
    return _each(ordeal.workers(99), psutil.Process.kill)


def stop_worker(ordeal: Ordeal) -> Hit | None:
    """SIGSTOP to one worker, SIGCONT some seconds later, when it may have been given up."""
    hit = ordeal.workers(1)
    for process in hit:
        threading.Timer(ordeal.random.uniform(3, 12), _quietly, (process, psutil.Process.resume)).start()
    return _each(hit, psutil.Process.suspend)


def slow_worker(ordeal: Ordeal) -> Hit | None:
    """One worker gets a fifth of its time, for some seconds."""
    hit, seconds = ordeal.workers(1), ordeal.random.uniform(3, 8)
    for process in hit:
        threading.Thread(target=_slow, args=(process, seconds), daemon=True).start()
    return [process.pid for process in hit] or None


def _slow(process: psutil.Process, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        _quietly(process, psutil.Process.suspend)
        time.sleep(0.2)
        _quietly(process, psutil.Process.resume)
        time.sleep(0.05)


def kill_node(ordeal: Ordeal) -> Hit | None:
    """All processes of a node are ended at once; a new node comes some seconds later."""
    nodes = ordeal.nodes()
    if not nodes:
        return None
    node = ordeal.random.choice(nodes)
    hit: Hit = [*ordeal.workers_on(node)]
    ordeal.replace_node(node)
    return hit


def drain_node(ordeal: Ordeal) -> Hit | None:
    """A node is given notice, as a spot instance is: its workers leave it and it ends; a new node comes some seconds
    later."""
    nodes = ordeal.nodes()
    return ordeal.drain(ordeal.random.choice(nodes)) if nodes else None


def kill_driver(ordeal: Ordeal) -> Hit | None:
    """SIGKILL to the driver, then `distmeta resume`."""
    driver = ordeal.pick()
    if driver is None:
        return None
    driver.process.kill()
    driver.wait(30)
    driver.go_on()
    return [driver.name]


def interrupt_driver(ordeal: Ordeal) -> Hit | None:
    """SIGTERM or SIGINT to the driver, which saves and exits with 130; then `distmeta resume`."""
    driver = ordeal.pick()
    if driver is None:
        return None
    listens(driver.process)
    driver.process.send_signal(ordeal.random.choice([signal.SIGTERM, signal.SIGINT]))
    code = driver.wait(300)
    if not driver.heed():
        # -2, which shells too show as 130, is what Python makes of it where it has struck an exec() of a string.
        ordeal.expect(driver, code in (130, -2, 0), f"ended with {code} after a signal")
        if not driver.done:
            driver.go_on()
    return [driver.name]


def damage_checkpoint(ordeal: Ordeal) -> Hit | None:
    """A byte is flipped in the last checkpoint, or a file is cut short or removed, while the driver is dead. What
    `distmeta resume` then says to do is done."""
    driver = ordeal.pick()
    saved = sorted((driver.folder / "checkpoints").glob("step-*")) if driver else []
    if driver is None or len(saved) < 2:
        return None
    driver.process.kill()
    driver.wait(30)
    saved = sorted((driver.folder / "checkpoints").glob("step-*"))
    driver.damaged = saved[-1]
    spoil(ordeal.random.choice(sorted(driver.damaged.iterdir())), ordeal.random)
    driver.go_on()
    code = driver.wait(300)
    ordeal.expect(driver, driver.heed(), f"ended with {code}, with a damaged checkpoint")
    return [driver.name]


def spoil(file: Path, rng: random.Random) -> None:
    """Damages a file in one of the ways in which disks do."""
    data = bytearray(file.read_bytes())
    way = rng.choice(["flip", "cut", "remove"])
    if way == "remove":
        file.unlink()
    elif way == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        # the rest of state.json is white space, which says nothing, and keys and checksums
        first, last = (data.index(b'"content"') + 12, len(data) - 3) if file.suffix == ".json" else (0, len(data))
        at = rng.randrange(first, last)
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)


def fill_disk(ordeal: Ordeal) -> Hit | None:
    """The disk of the runs is filled until one of them ends, and says so; then there is room again, and it goes on."""
    if ordeal.disk is None or not any(not driver.done for driver in ordeal.drivers):
        return None
    ballast = ordeal.disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * (1 << 16))
        except OSError:
            pass
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and not all(driver.ended for driver in ordeal.drivers):
        time.sleep(0.1)
    ballast.unlink()
    time.sleep(0 if all(driver.ended for driver in ordeal.drivers) else 5)  # for those that are about to end
    ended = [driver for driver in ordeal.drivers if driver.wait(0.01) is not None and not driver.done]
    hit = [driver for driver in ended if not driver.heed()]
    for driver in hit:
        words = driver.last_words()
        ordeal.expect(driver, driver.process.returncode == 1 and "No space left on device" in words,
                      f"ended with {driver.process.returncode} on a full disk: {words[-600:]}")  # fmt: skip
    for driver in hit:
        driver.go_on()
    return [driver.name for driver in hit] or None


def mount(folder: Path, size: str) -> str | None:
    """Mounts a small file system; the reason if that cannot be done."""
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "there is no command mount"
    return done.stderr.strip() if done.returncode else None


FAULTS: dict[str, Callable[[Ordeal], Hit | None]] = {
    "worker killed": kill_worker,
    "all workers killed": kill_all_workers,
    "worker stopped": stop_worker,
    "worker slowed": slow_worker,
    "node killed": kill_node,
    "node drained": drain_node,
    "driver killed": kill_driver,
    "driver interrupted": interrupt_driver,
    "checkpoint damaged": damage_checkpoint,
    "disk full": fill_disk,
}
WEIGHTS = [8, 2, 4, 3, 2, 2, 3, 2, 2, 1]
"""How often each is drawn in a long run."""


def _each(processes: list[psutil.Process], action: Callable[[psutil.Process], None]) -> Hit | None:
    return [process.pid for process in processes if _quietly(process, action)] or None


def _quietly(process: psutil.Process, action: Callable[[psutil.Process], None]) -> bool:
    """Does it, unless the process is gone meanwhile; psutil knows it from another one of the same number."""
    try:
        action(process)
    except psutil.NoSuchProcess:
        return False
    return True

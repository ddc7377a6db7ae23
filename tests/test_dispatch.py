"""Who is sent which shard, with a clock that the test turns; and a worker that stands still."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from problems import Blobs, problem_of

from distmeta import MAML, Episode, Split
from distmeta.config import Scaling
from distmeta.distributed.dispatch import QUEUED, SLOW, Begun, Dispatch
from distmeta.distributed.executor import InProcess, reduce_mean
from distmeta.distributed.ray import RayPool
from distmeta.distributed.work import shards_of
from distmeta.models import MLP

SHARDS = shards_of("train", 0, 6, 1)


class Clock:
    now = 0.0
    looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


class Counted(Blobs):
    """Blobs that count in a file the training tasks that are built."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        if split == "train":
            with self.file.open("a") as file:
                file.write(".")
        return super().sample(rng, split)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def sent(round_: Dispatch[str], *workers: str) -> list[tuple[str, int]]:
    """All that is to be sent now."""
    given = []
    while (one := round_.next(workers)) is not None:
        given.append(one)
    return given


def test_each_worker_has_two_at_a_time(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS, {}, clock)
    assert sent(round_, "a", "b") == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    assert QUEUED == 2
    assert round_.done("b", 1)
    assert sent(round_, "a", "b") == [("b", 4)]
    assert round_.holders == {SHARDS[1]: "b"}


def test_who_holds_the_data_gets_the_shard(clock: Clock) -> None:
    holders = {SHARDS[0]: "b", SHARDS[1]: "a", SHARDS[2]: "gone"}
    round_ = Dispatch[str](SHARDS[:3], holders, clock)
    assert sent(round_, "a", "b") == [("a", 1), ("b", 0), ("a", 2)]


def test_a_lost_workers_shards_come_first(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS, {}, clock)
    sent(round_, "a", "b")
    assert round_.lost("a") == 0
    assert list(round_.waiting) == [0, 2, 4, 5]
    assert round_.tries == {0: 1}, "what was queued behind it is not to blame"
    assert round_.lost("never here") is None


def test_an_idle_worker_does_what_a_slow_one_has(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS[:4], {}, clock)
    assert sent(round_, "a", "b") == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    for index in (1, 3):
        clock.now += 10
        assert round_.done("b", index)
    assert sent(round_, "a", "b") == [], "20 seconds are not three times 10"
    clock.now = 10 * SLOW + 0.1
    assert sent(round_, "a", "b") == [("b", 2)], "which the slow one has not come to"
    clock.now += 10
    assert round_.done("b", 2)
    assert sent(round_, "a", "b") == [("b", 0)], "and then what it is at"
    assert sent(round_, "a", "b", "c") == [], "no third copy"
    clock.now += 1
    assert round_.done("a", 0), "the first result counts"
    assert not round_.missing
    assert not round_.done("b", 0)


def test_an_idle_worker_takes_what_waits_for_a_slow_one(clock: Clock) -> None:
    """Whose data the slow one holds: they are sampled again rather than waited for."""
    holders = {shard: "a" if i < 4 else "b" for i, shard in enumerate(SHARDS)}
    round_ = Dispatch[str](SHARDS, holders, clock)
    assert sent(round_, "a", "b") == [("a", 0), ("b", 4), ("a", 1), ("b", 5)]
    for index in (4, 5):
        clock.now += 2
        round_.done("b", index)
    assert sent(round_, "a", "b") == []
    clock.now = 6.1
    assert sent(round_, "a", "b") == [("b", 2)]
    clock.now += 2
    round_.done("b", 2)
    assert sent(round_, "a", "b") == [("b", 3)]


def test_short_shards_are_not_sent_twice(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS[:2], {}, clock)
    sent(round_, "a", "b")
    clock.now = 0.01
    round_.done("a", 0)
    clock.now = 1.9
    assert sent(round_, "a", "b") == []


def test_a_lost_copy_is_not_sent_again(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS[:2], {}, clock)
    sent(round_, "a", "b")
    clock.now = 1.0
    round_.done("b", 1)
    clock.now = 4.0
    assert sent(round_, "a", "b") == [("b", 0)]
    assert round_.lost("a") == 0
    assert not round_.waiting, "the idle worker is at it already"


def test_a_result_of_a_worker_given_up_counts(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS[:2], {}, clock)
    sent(round_, "a")
    round_.lost("a")
    assert list(round_.waiting) == [0, 1]
    assert round_.done("a", 0)
    assert sent(round_, "b") == [("b", 1)]


def test_hung_workers_are_those_at_one_shard_for_long(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS[:4], {}, clock)
    sent(round_, "a", "b")
    clock.now = 9.0
    round_.done("b", 1)
    clock.now = 12.0
    assert round_.hung(10.0) == ["a"]
    assert round_.hung(2.0) == ["a", "b"]
    round_.lost("b")
    sent(round_, "b")
    clock.now += 3.0
    assert "b" not in round_.hung(2.0), "twice the time for a shard at which one has been lost"


def test_a_shard_that_is_given_up_is_not_waited_for(clock: Clock) -> None:
    round_ = Dispatch[str](SHARDS[:2], {}, clock)
    sent(round_, "a")
    round_.lost("a")
    round_.give_up(0)
    assert sent(round_, "b") == [("b", 1)]
    assert round_.done("b", 1)
    assert not round_.missing
    assert not round_.done("a", 0), "a result that comes after all does not count"


def test_bookkeeping_of_a_result_does_not_grow_with_the_workers(clock: Clock) -> None:
    """Each of the idle ones asked for each of the busy ones once, which took seconds a step with 256 of them."""
    workers = [str(i) for i in range(200)]
    round_ = Dispatch[str](shards_of("train", 0, len(workers), 1), {}, clock)
    given = sent(round_, *workers)
    clock.now = 1.0
    for worker, index in given:
        assert round_.done(worker, index)
        assert not sent(round_, *workers)
    assert clock.looks <= 4 * len(workers)


def test_what_is_built_ahead_outlasts_an_evaluation(tmp_path: Path, ray_cluster: None) -> None:
    problem, theta = problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), Counted(tmp_path / "built"))
    first, second = (shards_of("train", step, 4, 2) for step in range(2))
    with RayPool(problem, Scaling(num_workers=1), most=2) as pool:
        pool.map("meta_gradient", theta, first, second)
        pool.map("evaluate", theta, shards_of("val", 0, 4, 2))
        pool.map("meta_gradient", theta, second)
    assert (tmp_path / "built").read_text() == 8 * "."


def test_the_round_to_come_is_begun_behind_the_present_one(clock: Clock) -> None:
    coming = shards_of("train", 1, 6, 1)
    round_, begun = Dispatch[str](SHARDS[:5], {}, clock), Begun[str, str](coming, np.zeros(1), "theta")

    def sent_ahead() -> None:
        while (given := begun.next(("a", "b"), round_)) is not None:
            begun.running[f"result {given[1].first}"] = given

    sent(round_, "a", "b")
    sent_ahead()
    assert not begun.running, "while a shard of the present one waits"
    round_.done("a", 0)
    sent(round_, "a", "b")
    sent_ahead()
    assert not begun.running, "nor to those who have two"
    for worker, index in (("a", 2), ("a", 4), ("b", 1)):
        round_.done(worker, index)
    sent_ahead()
    assert begun.running == {
        "result 0": ("a", coming[0]), "result 1": ("a", coming[1]), "result 2": ("b", coming[2]),
    }  # fmt: skip
    after = Dispatch[str](coming, {}, clock)
    assert begun.adopted_by(after, ("a", "c")) == {"result 0": ("a", 0), "result 1": ("a", 1)}, "b is gone"
    assert list(after.waiting) == [2, 3, 4, 5] and after.queues == {"a": [0, 1]}
    assert after.lost("a") == 0 and list(after.waiting) == [0, 1, 2, 3, 4, 5]


def test_a_step_whose_parameters_are_known_is_computed_ahead(tmp_path: Path, ray_cluster: None) -> None:
    """While the driver does other things, an evaluation among them; each task is built once."""
    problem, theta = problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), Counted(tmp_path / "built"))
    first, second = (shards_of("train", step, 4, 2) for step in range(2))
    with RayPool(problem, Scaling(num_workers=1), most=2) as pool:
        pool.map("meta_gradient", theta, first, second, ahead=theta + 1)
        deadline = time.monotonic() + 60
        while (tmp_path / "built").stat().st_size < 8 and time.monotonic() < deadline:
            time.sleep(0.05)
        pool.map("evaluate", theta, shards_of("val", 0, 4, 2))
        results = pool.map("meta_gradient", theta + 1, second)
    assert (tmp_path / "built").read_text() == 8 * "."
    expected = InProcess(problem).map("meta_gradient", theta + 1, second)
    assert np.array_equal(reduce_mean(results), reduce_mean(expected))


@pytest.mark.parametrize("timeout", [4.0, 300.0])
def test_a_worker_that_stands_still_changes_nothing(timeout: float, ray_cluster: None) -> None:
    """Stopped in the middle of its work: another one does its shards, and where it is given up, it is replaced."""
    problem, theta = problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), Blobs())
    rounds = [shards_of("train", step, 12, 2) for step in range(8)]
    expected = [reduce_mean(InProcess(problem).map("meta_gradient", theta, shards)) for shards in rounds]
    with RayPool(problem, Scaling(num_workers=2, shard_timeout=timeout), most=6) as pool:
        pool._wait_for(2)
        victim, state = next(iter(pool._workers.items()))
        stopper = threading.Timer(0.3, os.kill, (state.process, signal.SIGSTOP))
        stopper.start()
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not pool.duplicates + pool.retries:
                for shards, wanted in zip(rounds, expected, strict=True):
                    assert np.array_equal(reduce_mean(pool.map("meta_gradient", theta, shards)), wanted)
            if timeout == 4.0:
                while time.monotonic() < deadline and victim in pool._workers:
                    assert np.array_equal(reduce_mean(pool.map("meta_gradient", theta, rounds[0])), expected[0])
                assert pool.retries == 1
            else:
                assert pool.duplicates >= 1
                assert pool.retries == 0
                os.kill(state.process, signal.SIGCONT)
                while time.monotonic() < deadline and pool._late:
                    assert np.array_equal(reduce_mean(pool.map("meta_gradient", theta, rounds[0])), expected[0])
                assert not pool._late, "it takes part again"
        finally:
            stopper.join()
            if timeout == 300.0:
                os.kill(state.process, signal.SIGCONT)

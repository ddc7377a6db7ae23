"""One task of many that goes wrong: it stops the run, or is left out and can be looked at afterwards."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from problems import Blobs, HeadedMLP, problem_of

import distmeta
from distmeta import MAML, Episode, RunFolder, Split
from distmeta.distributed import ray as pool
from distmeta.distributed.executor import InProcess, reduce_mean
from distmeta.distributed.work import shards_of
from distmeta.errors import NumericalError, WorkerError
from distmeta.replay import replay
from distmeta.tasks.control import Outcome
from distmeta.tasks.gym_control import GymControl
from distmeta.tasks.navigation import Navigation, Points
from distmeta.tasks.watchdog import TICKS, Hung, Watchdog


class Poisoned(Blobs):
    """Blobs, of which about every fifth training task has a query set that is not finite."""

    share = 0.2

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        episode = super().sample(rng, split)
        if split == "train" and rng.random() < self.share:
            x, y = episode.query_set
            return Episode(episode.support_set, (torch.full_like(x, torch.inf), y))
        return episode


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_skipped_tasks_are_those_of_no_run(strategy: str) -> None:
    """The mean is that of the sound tasks alone, and the failures are named by their place."""
    torch.manual_seed(0)
    problem, theta = problem_of(MAML(inner_lr=0.1), HeadedMLP(3, 3), Poisoned(), strategy=strategy, on_failure="skip")
    results = InProcess(problem).map("meta_gradient", theta, shards_of("train", 0, 24, 8))
    skipped = {index: reason for result in results for index, reason in result.skipped.items()}
    assert 2 <= len(skipped) <= 10
    assert all(f"of task {i} of step 0 (split train, seed 1)" in reason for i, reason in skipped.items())
    problem.on_failure = "raise"
    sound = [i for i in range(24) if i not in skipped]
    singles = [shard for shard in shards_of("train", 0, 24, 1) if shard.first in sound]
    alone = InProcess(problem).map("meta_gradient", theta, singles)
    np.testing.assert_allclose(reduce_mean(results), reduce_mean(alone), rtol=1e-4, atol=1e-7)
    assert sum(result.tasks for result in results) == len(sound)
    with pytest.raises(NumericalError, match=r"train.on_failure=skip leaves such tasks out"):
        InProcess(problem).map("meta_gradient", theta, shards_of("train", 0, 24, 8))


def test_a_step_without_a_sound_task_stops_the_run() -> None:
    torch.manual_seed(0)
    tasks = Poisoned()
    tasks.share = 1.0
    problem, theta = problem_of(MAML(inner_lr=0.1), HeadedMLP(3, 3), tasks, on_failure="skip")
    results = InProcess(problem).map("meta_gradient", theta, shards_of("train", 0, 4, 2))
    with pytest.raises(NumericalError, match="all 4 tasks of an outer step were skipped; the first one, since the"):
        reduce_mean(results)


SETTINGS = ["train.meta_batch_size=6", "train.shard_size=2", "validation.every=0", "evaluation.tasks=0"]


def train(path: Path, *overrides: str) -> RunFolder:
    return distmeta.train(
        {"tasks": {"use": "test_failures:Poisoned"}, "model": {"use": "mlp", "hidden": [8]}},
        "algorithm={use: maml, inner_lr: 0.1}", "train.log_every=1", "checkpoint.every=4", *SETTINGS,
        f"run_dir={path}", *overrides,
    )  # fmt: skip


def test_a_run_goes_on_and_its_failures_can_be_replayed(
    tmp_path: Path, ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "distmeta")
    runs = {
        n: train(tmp_path / str(n), "train.on_failure=skip", "train.steps=10", f"scaling.num_workers={n}")
        for n in (0, 2)
    }
    parameters = {(run.checkpoints / "step-00000010" / "meta.safetensors").read_bytes() for run in runs.values()}
    assert len(parameters) == 1, "whoever skips"
    lines = [record for record in runs[2].records() if record["kind"] == "train"]
    skipped = [entry for line in lines for entry in line.get("skipped", [])]
    assert skipped == [e for r in runs[0].records() for e in r.get("skipped", [])]
    assert all(line["tasks"] == 6 - len(line.get("skipped", [])) for line in lines)
    assert f"task {skipped[0]['task']} of step {skipped[0]['step']} is skipped: the " in caplog.text
    assert f"<td>{len(skipped)}</td>" in (runs[0].path / "report" / "index.html").read_text()

    late = skipped[-1]  # behind the last checkpoint before it, from which the steps are done again
    seen = replay(runs[2].path, late["step"], late["task"])
    assert 0 <= seen.rerun < 10
    assert np.isfinite(seen.rows[1]["support loss"])
    assert not np.isfinite(seen.rows[1]["query loss"])
    assert not all(np.isfinite(norm) for norm in seen.gradients.values())
    failed = {entry["task"] for entry in skipped if entry["step"] == late["step"]}
    other = min(set(range(6)) - failed)
    sound = replay(runs[2].path, late["step"], other)
    assert sound.rows[1]["change"] > 0 == sound.rows[0]["change"]
    assert all(np.isfinite(norm) for norm in sound.gradients.values())

    here = Path(__file__).parent  # where the run's tasks are imported from
    command = [sys.executable, "-m", "distmeta", "replay", runs[0].path, "--step", str(late["step"])]
    done = subprocess.run(
        [*command, "--task", str(late["task"])], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert f"task {late['task']} of step {late['step']}, at the parameters that it had then" in done.stdout
    done = subprocess.run([*command, "--task", "6"], capture_output=True, text=True, cwd=here)
    assert done.returncode == 2
    assert "--task must be between 0 and 5 in this run; given: 6" in done.stderr


@pytest.mark.parametrize("stale", ["false", "true"])
def test_replay_of_a_step_is_to_the_bit(stale: str, tmp_path: Path) -> None:
    """From whichever checkpoint, and of the step that stopped a run."""
    settings = ["train.steps=10", "scaling.num_workers=0", f"outer.stale={stale}"]
    with pytest.raises(NumericalError, match=r"is nan|is inf") as stopped:
        train(tmp_path / "run", *settings)
    (step,) = RunFolder.open(tmp_path / "run").checkpoints.glob("step-*")
    number = int(step.name.removeprefix("step-"))
    assert f"of step {number} " in str(stopped.value)
    first = replay(tmp_path / "run", number, 0)
    assert first.rerun == 0
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    distmeta.resume(copy, "train.on_failure=skip")
    straight = train(tmp_path / "straight", *settings, "train.on_failure=skip")
    last = "checkpoints/step-00000010/meta.safetensors"
    assert (copy / last).read_bytes() == (straight.path / last).read_bytes()

    shutil.rmtree(step)
    again = replay(tmp_path / "run", number, 0)
    assert again.rerun == number
    assert str((again.rows, again.gradients)) == str((first.rows, first.gradients)), "as text, where nan equals nan"


class Jammed(Navigation):
    """The environment of about every fourth goal raises."""

    def simulator(self, goal: np.ndarray, episodes: int) -> Points:
        fail = self.fail

        class Jam(Points):
            def step(self, action_EA: np.ndarray) -> Outcome:
                if goal[0] > 0.25:
                    fail()
                return super().step(action_EA)

        return Jam(episodes)

    def fail(self) -> None:
        raise RuntimeError("jammed")


class Stuck(Jammed):
    """The environment of about every fourth goal hangs."""

    def fail(self) -> None:
        threading.Event().wait()


def control(folder: Path, tasks: Navigation, *more: str) -> RunFolder:
    settings = ["train.meta_batch_size=8", "train.shard_size=2", "train.steps=3", "validation.every=0"]
    settings += ["evaluation.tasks=0", "model.hidden=[8]", f"run_dir={folder}"]
    return distmeta.train("navigation-maml-trpo", *settings, *more, tasks=tasks)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Jammed, r"Jammed raised RuntimeError at the goal \[.*\] \(streams of \d+\): jammed"),
        (
            Stuck,
            r"Stuck hangs at the goal \[.*\] \(streams of \d+\): one step of its 2 copies has taken more than 0.5 s",
        ),
    ],
    ids=["raises", "hangs"],
)
def test_environments_that_fail_are_skipped_in_all_passes(
    kind: type[Jammed], message: str, tmp_path: Path, ray_cluster: None
) -> None:
    """With the same bits however they fail, whoever samples them."""

    def run(folder: str, *more: str, kind: type[Jammed] = kind) -> RunFolder:
        return control(tmp_path / folder, kind(episodes=2, horizon=5, step_timeout=0.5), *more)

    with pytest.raises(WorkerError, match=message):
        run("raise", "scaling.num_workers=0")
    runs = [run(str(n), "train.on_failure=skip", f"scaling.num_workers={n}") for n in (0, 2)]
    runs.append(run("raises", "train.on_failure=skip", "scaling.num_workers=0", kind=Jammed))
    lines = [[record for record in each.records() if record["kind"] == "train"] for each in runs]
    assert any(kind.__name__ in entry["why"] for line in lines[0] for entry in line.get("skipped", []))
    assert [line.get("skipped") for line in lines[0]] == [line.get("skipped") for line in lines[1]]
    assert all(line["gain"] > 0 and 0 < line["kl"] <= 0.02 for line in lines[0])
    assert len({(each.checkpoints / "step-00000003" / "meta.safetensors").read_bytes() for each in runs}) == 1


def test_a_shard_that_always_hangs_is_left_out(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no signal reaches the environment, its worker is ended, and another, and then it is done without."""
    monkeypatch.setattr(pool, "TRIES", 2)
    monkeypatch.setattr(pool, "HANGS", 1.0)
    caplog.set_level(logging.WARNING, "distmeta")

    def run(folder: str, tasks: Jammed, *more: str) -> RunFolder:
        return control(tmp_path / folder, tasks, "train.shard_size=1", "train.steps=1", *more)

    stuck = Stuck(episodes=2, horizon=5, step_timeout=None)
    workers = ["scaling.num_workers=2", "scaling.shard_timeout=2"]
    left = run("left", stuck, "train.on_failure=skip", *workers)
    jammed = run("jammed", Jammed(episodes=2, horizon=5), "train.on_failure=skip", "scaling.num_workers=0")
    skipped = [{e["task"]: e["why"] for r in each.records() for e in r.get("skipped", [])} for each in (left, jammed)]
    assert 0 < len(skipped[0]) < 8
    assert skipped[0].keys() == skipped[1].keys()
    task, why = skipped[0].popitem()
    assert f"tasks {task}-{task} of step 0 (split train) have lost 2 workers in a row, with seed 0: at one shard" in why
    last = "checkpoints/step-00000001/meta.safetensors"
    assert (left.path / last).read_bytes() == (jammed.path / last).read_bytes()
    with pytest.raises(WorkerError, match=r"have lost 2 workers in a row, with seed 0: .* raise scaling.shard_timeout"):
        run("raise", stuck, *workers)


class TestWatchdog:
    def test_a_call_is_interrupted_and_others_are_not(self) -> None:
        with Watchdog(0.2) as watchdog:
            for _ in range(5):
                watchdog.call(lambda: time.sleep(0.1))
            start = time.monotonic()
            with pytest.raises(Hung):
                watchdog.call(threading.Event().wait)
            assert time.monotonic() - start < 5
            time.sleep(0.5)  # between calls nothing is limited
            assert watchdog.call(lambda: 7) == 7

    def test_a_call_that_goes_on_is_interrupted_again(self) -> None:
        def stubborn() -> None:
            for _ in range(3):
                try:
                    threading.Event().wait()
                except Hung:
                    last = time.monotonic()
            raise TimeoutError(last)

        with Watchdog(0.2) as watchdog, pytest.raises(TimeoutError):
            watchdog.call(stubborn)

    def test_a_process_that_is_stopped_does_not_hang(self) -> None:
        """The alarms of the time in which it does not run are one, as those of a time in which they are blocked."""

        def pause() -> str:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(0.5)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            return "done"

        assert TICKS > 2
        with Watchdog(0.3) as watchdog:
            assert watchdog.call(pause) == "done"

    def test_another_alarm_goes_on(self) -> None:
        rung: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
        timer = signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with Watchdog(1.0) as watchdog:
                watchdog.call(lambda: time.sleep(0.4))
                assert not rung
            time.sleep(0.1)
            assert rung == [signal.SIGALRM]
        finally:
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, *timer)

    def test_other_threads_are_not_limited(self) -> None:
        given: list[int] = []

        def elsewhere() -> None:
            with Watchdog(1e-3) as watchdog:
                given.append(watchdog.call(lambda: (time.sleep(0.1), 5)[1]))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert given == [5]


class Dying(gymnasium.Env):
    """Once it has met a goal above 0.6 it raises for ever."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    goal, dead = 0.0, False

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.array([self.goal]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.dead |= self.goal > 0.6
        if self.dead:
            raise RuntimeError("dead")
        return np.array([self.goal]), float(action[0]), False, False, {}


@dataclass(eq=False)
class Deaths(GymControl):
    def draw(self, rng: np.random.Generator, split: Split) -> float:
        return float(rng.uniform())

    def make(self, name: str, **options: Any) -> Dying:
        return Dying()

    def apply(self, env: Dying, goal: float) -> None:
        env.goal = goal


def test_an_environment_that_has_failed_is_not_used_again(tmp_path: Path, ray_cluster: None) -> None:
    """Which tasks are skipped is up to the tasks, not to who has met which before; validation goes on without them."""

    def run(workers: int) -> RunFolder:
        return distmeta.train(
            "navigation-maml-trpo", "train.meta_batch_size=12", "train.shard_size=2", "train.steps=2",
            "model.hidden=[8]", "train.on_failure=skip", "validation.every=1", "validation.tasks=10",
            "evaluation.tasks=10", f"scaling.num_workers={workers}", f"run_dir={tmp_path / str(workers)}",
            tasks=Deaths(episodes=2, horizon=3),
        )  # fmt: skip

    one, two = run(0), run(2)
    lines = [[record for record in each.records() if record["kind"] == "train"] for each in (one, two)]
    assert [line.get("skipped") for line in lines[0]] == [line.get("skipped") for line in lines[1]]
    assert 0 < len(lines[0][0]["skipped"]) < 12
    judged = [record["tasks"] for record in one.records() if record["kind"] == "val"]
    assert 0 < judged[0] < 10
    assert one.summary()["test"] == two.summary()["test"]


def test_a_validation_that_fails_loses_nothing(tmp_path: Path) -> None:
    settings = ["train.meta_batch_size=2", "train.steps=5", "model.hidden=[8]", "validation.every=2"]
    with pytest.raises(WorkerError, match="jammed"):
        distmeta.train(
            "navigation-maml-trpo", *settings, "validation.tasks=20", "scaling.num_workers=0", "checkpoint.every=100",
            f"run_dir={tmp_path / 'run'}", tasks=JammedLater(episodes=2, horizon=5),
        )  # fmt: skip
    assert RunFolder.open(tmp_path / "run").checkpoint("last").state["outer"]["step"] == 2


class JammedLater(Jammed):
    """Only the tasks of validation fail."""

    def draw(self, rng: np.random.Generator, split: Split) -> np.ndarray:
        goal = super().draw(rng, split)
        return -np.abs(goal) if split == "train" else goal


def test_a_policy_that_diverges_is_not_the_environments_fault(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"the policy puts out is not finite in step \d.*lower algorithm.inner_lr"):
        distmeta.train(
            "navigation-maml-trpo", "algorithm.inner_lr=1e30", "algorithm.inner_steps=2", "train.meta_batch_size=2",
            "train.steps=1", "scaling.num_workers=0", f"run_dir={tmp_path / 'run'}",
        )  # fmt: skip

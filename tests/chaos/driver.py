"""One run as its user has it: a process on the command line, what it says, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

COMMON = [
    "tasks={use: 'chaos.tasks:Dawdling', shots: 10, test_queries: 20}", "model.hidden=[16, 16]",
    "train.meta_batch_size=6", "train.shard_size=1", "train.strategy=loop", "train.log_every=1",
    "validation.every=40", "validation.tasks=4", "evaluation.tasks=0", "checkpoint.every=10", "checkpoint.keep_last=3",
    "scaling.shard_timeout=5", "scaling.start_timeout=200",
]  # fmt: skip
RUNS = {
    "maml": ["sinusoid-maml"],
    "reptile": ["sinusoid-maml", "algorithm={use: reptile, inner_lr: 0.01}", "outer={use: SGD, lr: 0.5}"],
}


def digest(run: Path) -> str:
    """The final meta-parameters, all bytes of them."""
    last = max((run / "checkpoints").glob("step-*"))
    return f"{last.name} {hashlib.sha256((last / 'meta.safetensors').read_bytes()).hexdigest()}"


def listens(process: subprocess.Popen[str]) -> None:
    """Returns once the command hears signals, some tenths of a second after Python has begun to start; or has ended."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


class Driver:
    """A run in ``folder``, which is begun, ends by somebody's hand or by itself, and is gone on with.

    Args:
        name: One of `RUNS`.
        folder: Of the run.
        environment: Of the process.
        workers: How many it asks for; 0: none, and no Ray.
        steps: Outer steps in all.
    """

    def __init__(self, name: str, folder: Path, environment: dict[str, str], workers: int, steps: int) -> None:
        self.name, self.folder, self.environment, self.steps = name, folder, environment, steps
        elastic = [f"scaling.num_workers={workers}", *(["scaling.min_workers=1"] if workers else [])]
        self.train = ["train", *RUNS[name], *COMMON, *elastic, f"train.steps={steps}", f"run_dir={folder}"]
        self.damaged: Path | None = None
        """The last checkpoint that somebody has damaged."""
        self.said: list[tuple[float, str]] = []
        """What it has written to standard error, and when."""
        self.go_on()

    def go_on(self, command: list[str] | None = None) -> None:
        """Starts the process: the run anew as long as there is none, else ``distmeta resume``."""
        begun = (self.folder / "config.yaml").exists()
        words = command or (["resume", str(self.folder)] if begun else self.train)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distmeta", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | self.environment,
        )  # fmt: skip
        self.from_step = self.step()
        """Where it was when the process was started."""
        self._mark = len(self.said)
        self._listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self._listener.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append((time.monotonic(), line.rstrip("\n")))

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self.process.poll() is not None

    @property
    def done(self) -> bool:
        """Whether the run has come to its end."""
        return (self.folder / "summary.json").exists()

    def wait(self, seconds: float) -> int | None:
        """The exit code, once it has ended; None if it has not within ``seconds``."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._listener.join(10)
        return code

    def failures(self) -> list[str]:
        """The exceptions whose tracebacks it has shown."""
        found: list[str] = []
        within = False
        for _, line in self.said:
            if within and line and not line[0].isspace():
                found.append(line)
            within = line.startswith("Traceback") or (within and line[:1].isspace())
        return found

    def last_words(self) -> str:
        """What the process at hand has said."""
        return "\n".join(line for _, line in self.said[self._mark :])

    def step(self) -> int:
        """The last outer step whose metrics are on disk."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
                lines = file.read().decode(errors="replace").split("\n")[:-1]
            return int(json.loads(lines[-1])["step"])
        except (OSError, ValueError, IndexError, KeyError):
            return 0

    def heed(self) -> bool:
        """Whether it has ended since it has found the checkpoint that was damaged; what it then says to do is done."""
        if self.damaged is None or self.wait(0.01) != 2 or f"{self.damaged.name} is damaged" not in self.last_words():
            return False
        words = shlex.split(self.last_words().split("`")[1])
        assert words[0] == "distmeta", words
        self.go_on(words[1:])
        return True

"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from distmeta.config import Config
from distmeta.evaluation import MOST_TOLD

EVERY = 15.0  # seconds between lines where there is no terminal


class Progress:
    """Shows step, time left, tasks a second and the latest loss and accuracy, on standard error."""

    def __init__(self, config: Config, step: int) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._total = config.train.steps
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("meta-training", total=self._total, completed=step, metrics="")
        self._said = time.monotonic()
        self._rate = 0.0
        self._last: float | None = None
        self._smooth: dict[str, float] = {}
        self._groups: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False)

    def advance(self, step: int, tasks: int, metrics: Mapping[str, float], groups: Mapping[str, float]) -> None:
        """Shows that ``step`` steps are done: the means over tasks, and one metric's over those of each group."""
        now = time.monotonic()
        if self._last is not None:
            rate = tasks / (now - self._last)
            self._rate = rate if not self._rate else 0.95 * self._rate + 0.05 * rate
        self._last = now
        for kept, values in ((self._smooth, metrics), (self._groups, groups)):
            for name, value in values.items():
                kept[name] = 0.9 * kept.get(name, value) + 0.1 * value
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self._smooth.items())
        if self._groups and len(self._groups) <= MOST_TOLD:
            shown += " (" + ", ".join(f"{name} {value:.3f}" for name, value in sorted(self._groups.items())) + ")"
        rate = f"{self._rate:.{0 if self._rate >= 10 else 2}f} tasks/s  " if self._rate else ""  # none after one step
        self._bar.update(self._task, completed=step, metrics=rate + shown)
        if self._bar.disable and now - self._said > EVERY:
            self._said = now
            left = f"  {(self._total - step) * tasks / self._rate / 60:.1f} min left" if self._rate else ""
            self.say(f"step {step}/{self._total}  {rate}{shown}{left}")

"""What a person sees while a search runs: a table on a terminal, a line for each trial that ends elsewhere."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live as Screen
from rich.table import Table

from distmeta.tune.results import STATES, state_of
from distmeta.tune.search import Search

EVERY = 15.0  # seconds between lines of where things stand, where there is no terminal
SHOWN = 16  # trials in the table: the best ones


def name_of(trial: Any) -> str:
    """What a trial and its folder are called: by the order in which trials were drawn, which Tune's tag begins with."""
    return f"trial-{int(trial.experiment_tag.partition('_')[0]):03d}"


class Live(Callback):
    """Follows the trials of a search, on standard error."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._best: dict[str, float] = {}
        self._budget: dict[str, int] = {}
        self._said = 0.0

    def __getstate__(self) -> dict[str, Any]:  # Tune keeps its callbacks in the state that it resumes from
        return {key: value for key, value in self.__dict__.items() if key not in ("_console", "_screen")}

    def setup(self, *args: Any, **info: Any) -> None:
        """Called once before the first trial."""
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._screen = Screen(console=self._console, refresh_per_second=2) if self._console.is_terminal else None
        self._said = time.monotonic()
        if self._screen:
            self._screen.start()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has validated."""
        metric, mode = self.search.metrics[0], self.search.modes[0]
        value = result.get(metric, math.nan)
        before = self._best.get(trial.trial_id)
        if math.isfinite(value) and (before is None or (value > before) == (mode == "max")):
            self._best[trial.trial_id] = value
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has come to its end, or was stopped."""
        last = trial.last_result or {}
        failure = f": {last['failure']}" if isinstance(last.get("failure"), str) else ""
        state = state_of("TERMINATED", last, self._steps(trial))  # which Tune only says after this call
        self._line(trial, f"{state} at step {last.get('step', 0)}{failure}")
        self._show(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed more often than it may."""
        self._line(trial, "failed: its process was lost or raised; results.csv says why")
        self._show(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """All trials have ended, or the search was stopped."""
        if self._screen:
            self._show(trials)
            self._screen.stop()

    def _line(self, trial: Any, text: str) -> None:
        best = (
            f", best {self.search.metrics[0]} {self._best[trial.trial_id]:.4f}" if trial.trial_id in self._best else ""
        )
        self._console.print(f"{name_of(trial)} {text}{best}  ({self._settings(trial)})", markup=False)

    def _show(self, trials: list[Any]) -> None:
        if self._screen:
            self._screen.update(self._table(trials))
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self._console.print(self._counts(trials), markup=False)

    def _counts(self, trials: list[Any]) -> str:
        states = Counter(self._state(trial) for trial in trials)
        states["waiting"] += max(0, self.search.trials - len(trials))  # that have not been drawn yet
        text = ", ".join(
            f"{states[state]} {state}" for state in ("running", "paused", "waiting", *STATES) if states[state]
        )
        ranked = self._ranked(trials)
        if ranked:
            text += (
                f"; best {self.search.metrics[0]} {self._best[ranked[0].trial_id]:.4f} ({self._settings(ranked[0])})"
            )
        return text

    def _ranked(self, trials: list[Any]) -> list[Any]:
        sign = -1 if self.search.modes[0] == "max" else 1
        return sorted((t for t in trials if t.trial_id in self._best), key=lambda t: sign * self._best[t.trial_id])

    def _table(self, trials: list[Any]) -> Table:
        table = Table("trial", "state", "step", self.search.metrics[0], "settings", title=self._counts(trials))
        rest = [t for t in trials if t.trial_id not in self._best]
        for trial in [*self._ranked(trials), *rest][:SHOWN]:
            best = self._best.get(trial.trial_id)
            table.add_row(
                name_of(trial),
                self._state(trial),
                f"{(trial.last_result or {}).get('step', 0)}/{self._steps(trial)}",
                "" if best is None else f"{best:.4f}",
                self._settings(trial),
            )
        return table

    def _steps(self, trial: Any) -> int:
        if trial.trial_id not in self._budget:
            self._budget[trial.trial_id] = self.search.trial_config(trial.config).train.steps
        return self._budget[trial.trial_id]

    def _state(self, trial: Any) -> str:
        return state_of(trial.status, trial.last_result, self._steps(trial))

    def _settings(self, trial: Any) -> str:
        settings = self.search.parsed.short(trial.config)
        if "seed" in trial.config:
            settings["seed"] = trial.config["seed"]
        return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())

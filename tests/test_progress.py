"""What a person sees while a run trains."""

from __future__ import annotations

from itertools import count

import pytest

from distmeta import progress
from distmeta.config import load


def test_lines_say_what_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the first step nobody knows how long it took; slow tasks have decimals."""
    seconds = count(step=20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with progress.Progress(load("glyphs-5way-1shot-maml", ["train.steps=9"]), 0) as shown:
        for step, tasks in ((1, 5), (2, 5), (3, 800)):
            shown.advance(step, tasks, {"loss": 1.0}, {})
    assert capsys.readouterr().err.splitlines() == [
        "step 1/9  loss 1.000",
        "step 2/9  0.25 tasks/s  loss 1.000  2.3 min left",
        "step 3/9  2.24 tasks/s  loss 1.000  35.8 min left",
    ]

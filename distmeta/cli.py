"""The command line: ``distmeta train | resume | evaluate | adapt | tune | diversity | status | replay | profile |
report | data | config``.

Exit codes: 0 success, 2 the user's mistake (one clear message on standard error), 130 after a stop by signal with the
state saved, 1 anything else.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distmeta.config import DEFAULT, load, packaged
from distmeta.errors import ConfigError, DistmetaError, Stopped

if TYPE_CHECKING:
    from distmeta.tasks.own import Predictions

app = typer.Typer(
    name="distmeta",
    help="Distributed gradient-based meta-learning on Ray and PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Run = Annotated[str, typer.Argument(help="Folder of a run, or its URL (s3://bucket/run).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, for example train.steps=100.")]
Which = Annotated[str, typer.Option("--checkpoint", help="best (by validation), last, or a step.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command whose errors become one line and an exit code."""

    @app.command()
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        logging.getLogger("distmeta").setLevel(logging.INFO)
        try:
            function(*args, **kwargs)
        except DistmetaError as error:
            _fail(f"error: {error}", error.exit_code)
        except Stopped as stopped:
            _fail(str(stopped), 130)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # as `distmeta config | head` leaves it
            raise SystemExit(1) from None
        except Exception as error:
            if os.environ.get("DISTMETA_DEBUG"):
                raise
            _fail(f"unexpected {type(error).__name__}: {error} (DISTMETA_DEBUG=1 shows where)", 1)

    return guarded


def _fail(message: str, code: int) -> None:
    print(message.replace("\n", "\\n"), file=sys.stderr)  # names of files may hold anything
    raise SystemExit(code)


@command
def train(
    config: Annotated[
        str | None, typer.Argument(help=f"A packaged configuration or a YAML file; none: {DEFAULT}, offline.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Meta-trains from the start, then judges the result on unseen test tasks."""
    overrides = list(overrides or [])
    if config is not None and "=" in config and not Path(config).exists():
        config, overrides = None, [config, *overrides]
    load(config, overrides)  # most mistakes are told at once; torch takes seconds to load

    from distmeta.training import train as run_training

    run_training(config, *overrides)


@command
def resume(
    run: Run,
    overrides: Overrides = None,
    checkpoint: Which = "last",
    allow: Annotated[
        list[str] | None, typer.Option(help="Setting or section that may differ though it changes the result.")
    ] = None,
) -> None:
    """Goes on with an interrupted run, to the bit as if it had not been interrupted."""
    from distmeta.training import resume as run_resumption

    run_resumption(run, *(overrides or []), checkpoint=checkpoint, allow=allow or ())


@command
def evaluate(
    run: Run,
    overrides: Overrides = None,
    episodes: Annotated[int | None, typer.Option(help="Unseen test tasks; none: evaluation.tasks.")] = None,
    checkpoint: Which = "best",
    out_of_scope: Annotated[
        float | None,
        typer.Option(
            metavar="RECALL",
            help="Also judge how queries of none of the classes are told: thresholds, chosen on validation tasks, "
            "keep this share of the others, for example 0.95.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Judges a run on unseen test tasks, before adaptation and after each inner step."""
    from rich.console import Console

    from distmeta.adaptation import evaluate as run_evaluation
    from distmeta.figures import figures

    result = run_evaluation(
        run, *(overrides or []), episodes=episodes, checkpoint=checkpoint, out_of_scope=out_of_scope
    )
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for shown in figures(result):
        if isinstance(shown, str):
            print(shown)
        else:
            Console().print(shown)


@command
def adapt(
    run: Run,
    support: Annotated[
        Path | None,
        typer.Option(
            help="What to adapt to: a folder with one folder of images for each class; a CSV or JSONL file of texts "
            "and labels, or of numbers; a TSV file of pairs of sentences."
        ),
    ] = None,
    query: Annotated[
        Path | None, typer.Option(help="What to predict: a folder of images; a file of texts, sentences or numbers.")
    ] = None,
    task: Annotated[int | None, typer.Option(min=0, help="Control: the number of an unseen task to adapt to.")] = None,
    film: Annotated[bool, typer.Option(help="Control: film an episode before and after.")] = False,
    out: Annotated[Path, typer.Option(help="New folder for what comes out, and the adapted weights.")] = Path(
        "adapted"
    ),
    checkpoint: Which = "best",
    out_of_scope: Annotated[
        float | None,
        typer.Option(
            metavar="THRESHOLD",
            help="Take queries whose score is less as of none of the classes; evaluate --out-of-scope chooses one.",
        ),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="What is compared with it: probability (of the likeliest class) or logit.")
    ] = None,
) -> None:
    """Adapts a trained run to a new task from a few examples, and predicts for others; or a policy, to a new goal."""
    from distmeta.adaptation import adapt_files, adapt_policy, scope_of
    from distmeta.runs import RunFolder

    folder = RunFolder.open(run)
    scope = scope_of(score, out_of_scope)
    if task is not None and support is None and query is None and scope is None:
        _show_scores(adapt_policy(folder, task, out, checkpoint=checkpoint, film=film))
    elif task is None and not film and support is not None and query is not None:
        _show_predictions(adapt_files(folder, support, query, out, checkpoint=checkpoint, scope=scope))
    else:
        raise ConfigError("adapt takes --support and --query, files of yours; or, for a run on control, --task instead")
    print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _show_scores(rows: list[dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from distmeta.evaluation import show_value

    table = Table("inner step", *rows[0])
    for step, scores in enumerate(rows):
        table.add_row(str(step), *(show_value(name, value) for name, value in scores.items()))
    Console().print(table)


def _show_predictions(predictions: Predictions) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from distmeta.evaluation import show_value

    table = Table(*predictions.columns[:3])
    for row in predictions.rows[:20]:
        table.add_row(*(escape(cell) for cell in row[:3]))
    Console().print(table)
    if len(predictions.rows) > 20:
        print(f"… and {len(predictions.rows) - 20} more")
    for name, value in predictions.scores.items():
        of = "" if name.endswith("recall") else f" of {len(predictions.rows)} whose truth is given"
        print(f"{name} {show_value(name, value)}{of}")


@command
def tune(
    search: Annotated[
        str | None, typer.Argument(help="A search of tune_configs/ by name, or a YAML file; none: lists them.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a search to go on with.")] = None,
) -> None:
    """Searches meta-hyperparameters with Ray Tune; every trial is a whole distributed run."""
    from distmeta.tune.packaged import searches

    if resume is not None:
        if search is not None:
            raise ConfigError(f"--resume goes on with a search as it was begun; it takes no {search!r} beside it")
        from distmeta.tune.run import resume_search

        resume_search(resume)
    elif search is None:
        _list(searches())
    else:
        from distmeta.tune.run import search as run_search

        run_search(search, *(overrides or []))


@command
def diversity(
    run: Run,
    overrides: Overrides = None,
    tasks: Annotated[int, typer.Option(help="Training tasks to compare in pairs.")] = 64,
    checkpoint: Which = "best",
) -> None:
    """Says how much the tasks of a run differ: the cosines of their meta-gradients, within and between groups."""
    from rich.console import Console
    from rich.table import Table

    from distmeta.diversity import diversity as compare
    from distmeta.similarity import FORMULA

    found = compare(run, *(overrides or []), tasks_compared=tasks, checkpoint=checkpoint)
    print(f"{len(found.groups)} training tasks at step {found.step}; mean {FORMULA}")
    if len(found.names) > 1:
        table = Table("", *found.names)
        for name, row in zip(found.names, found.table(), strict=True):
            table.add_row(name, *("–" if value != value else f"{value:+.2f}" for value in row))
        Console().print(table)
    print(found.reading())
    print("kept in diversity.json of the run, and drawn in its report")


@command
def status(run: Run) -> None:
    """Says how far a run has come, from another terminal."""
    from distmeta.report import status as describe_run
    from distmeta.runs import RunFolder

    print(describe_run(RunFolder.open(run)))


@command
def replay(
    run: Run,
    step: Annotated[int, typer.Option(help="Outer step, from 0.")],
    task: Annotated[int, typer.Option(help="Index of the task in the meta-batch, from 0.")],
) -> None:
    """Adapts once more to one task of a run, and shows its losses: to see why it failed or was skipped."""
    from rich.console import Console
    from rich.table import Table

    from distmeta.replay import replay as go_back

    seen = go_back(run, step, task)
    print(f"task {task} of step {step}, at the parameters that it had then ({seen.rerun} outer steps done again)")
    if seen.rows:
        columns = list(dict.fromkeys(name for row in reversed(seen.rows) for name in row))
        table = Table("inner step", *columns)
        for k, row in enumerate(seen.rows):
            table.add_row(str(k), *(f"{row[name]:.6g}" if name in row else "" for name in columns))
        Console().print(table)
    if seen.gradients:
        norms = Table("meta-gradient of", "norm")
        for name, norm in seen.gradients.items():
            norms.add_row(name, f"{norm:.6g}")
        Console().print(norms)
    if seen.failure:
        print(f"it fails: {seen.failure}")


@command
def profile(run: Run, checkpoint: Which = "last") -> None:
    """Shows where a run's time has gone, and what one task shard spends it on in this process."""
    from rich.console import Console

    from distmeta.profiling import profile as measure

    seen = measure(run, checkpoint)
    for table in seen.tables():
        Console().print(table)
    print(f"the whole course of the shard, for https://ui.perfetto.dev: {seen.trace}")


@command
def report(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or their URLs.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the page; none: RUN/report, or report.")] = None,
) -> None:
    """Draws the pictures of one run, or one page that compares several."""
    from distmeta.report import report as make_report
    from distmeta.runs import RunFolder

    print(make_report([RunFolder.open(run) for run in runs], out))


@command
def data(
    name: Annotated[str | None, typer.Argument(help="A data set; none: lists them.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options of it as key=value, such as path=my/images.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of data sets; none: $DISTMETA_DATA or the cache.")] = None,
) -> None:
    """Downloads a data set, or checks the one that is there; says what is in it."""
    from distmeta.components import build, find
    from distmeta.tasks import TASKS
    from distmeta.tasks.datasets import DataTasks

    if name is None:
        for known, kind in TASKS.items():
            print(f"{known:12} {(kind.__doc__ or '').strip().splitlines()[0]}")
        return
    kind = find("data", name, TASKS)
    options = load(None, [f"tasks.use={name}", *(f"tasks.{override}" for override in overrides or [])]).tasks.options
    tasks = build("tasks", kind, options, **({} if root is None else {"data_root": str(root)}))
    if callable(getattr(tasks, "prepare", None)):
        tasks.prepare()
    if not isinstance(tasks, DataTasks):
        print(f"{name} is complete; it needs no data")
        return
    print(f"{name} is complete: {tasks.describe()}")
    for about in tasks.card():
        print(f"  {about}")


@command
def config(
    name: Annotated[
        str | None, typer.Argument(help="A packaged configuration or a YAML file; none: lists them.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Lists the packaged configurations, or prints one, whole, with every setting explained."""
    if name is None:
        _list(packaged())
    else:
        from distmeta.explain import explain_config

        print(explain_config(load(name, overrides or [])), end="")


def _list(files: Mapping[str, Path]) -> None:
    """Prints names beside what the first lines of their files say."""
    width = max(map(len, files))
    for name, path in files.items():
        about = [line[2:] for line in path.read_text("utf-8").splitlines() if line.startswith("# ")]
        print(f"{name:{width}} {about[0] if about else ''}")

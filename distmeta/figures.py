"""The figures of an evaluation, as tables and lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from distmeta.evaluation import Evaluation, show


def figures(result: Evaluation) -> Iterator[Table | str]:
    """All that `distmeta.adaptation.evaluate` has found."""
    yield _by_inner_step(result)
    yield f"change of {result['metric']} by adaptation, task by task: {show(result['metric'], result['change'])}"
    if "groups" in result:
        yield _by_group(result)
    for name, ends in result.get("judged", {}).items():
        yield f"{name} {show(name, ends['before'])} before adaptation, {show(name, ends['after'])} after"
    if "inductive" in result:
        yield f"inductive (no query example sees another): accuracy {show('accuracy', result['inductive'])}"
    if "out_of_scope" in result:
        yield from _scope(result["out_of_scope"], result["tasks"])


def _by_inner_step(result: Evaluation) -> Table:
    kind = ", transductive: normalised by query batch statistics" if result["transductive"] else ""
    table = Table(title=f"{result['tasks']} unseen tasks, mean ± 95% CI{kind}", title_justify="left")
    table.add_column("inner steps", justify="right")
    for name in result["by_inner_step"]:
        table.add_column(name, justify="right")
    for step in range(len(result["by_inner_step"]["loss"])):
        row = [show(name, values[step]) for name, values in result["by_inner_step"].items()]
        made = result["made_head"]
        table.add_row("head" if made and step == 1 else str(step - (made and step > 1)), *row)
    return table


def _by_group(result: Evaluation) -> Table:
    metric, inductive = result["metric"], "inductive" in result
    table = Table("group", title=f"{metric} by group of tasks", title_justify="left")
    for heading in ("tasks", "before", "after", "change", *(["inductive"] if inductive else [])):
        table.add_column(heading, justify="right")
    for name, group in result["groups"].items():
        shown = [group[key] for key in ("before", "after", "change", *(["inductive"] if inductive else []))]
        table.add_row(name, str(group["tasks"]), *(show(metric, figure) for figure in shown))
    return table


def _scope(result: dict[str, Any], tasks: int) -> Iterator[Table | str]:
    recall = f"{100 * result['recall']:.4g}%"
    title = (
        f"queries out of scope, {tasks} unseen tasks; thresholds keep {recall} of the in-scope queries of "
        f"{result['validation_tasks']} validation tasks"
    )
    table = Table("", title=title, title_justify="left")
    for kind in result["scores"]:
        table.add_column(f"by {kind}", justify="right")
    headings = {
        "auroc": "AUROC",
        "fpr95": "FPR at 95% TPR",
        "kept": "in scope, kept",
        "accuracy": "in scope, kept and right",
        "found": "out of scope, found",
    }
    for name, heading in headings.items():
        table.add_row(heading, *(show(name, found[name]) for found in result["scores"].values()))
    table.add_row("threshold", *(f"{found['threshold']:.8g}" for found in result["scores"].values()))
    yield table
    best = max(result["scores"], key=lambda kind: result["scores"][kind]["auroc"]["mean"])
    yield f"adapt: --score {best} --out-of-scope {result['scores'][best]['threshold']:.8g}"

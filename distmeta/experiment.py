"""From a configuration to the objects that it names."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distmeta.algorithms import ALGORITHMS, MetaAlgorithm
from distmeta.algorithms.reptile import Reptile
from distmeta.components import Component, build, find, options_of
from distmeta.config import Config
from distmeta.core.algorithm import Bilevel
from distmeta.core.loss import CRITERIA, Criterion, ModuleLoss, PureModule
from distmeta.core.params import Layout, join
from distmeta.core.policy import ActionSpec, PolicyLoss
from distmeta.core.seeds import torch_seed
from distmeta.core.types import Params, Split, TaskDistribution, TaskSpec
from distmeta.distributed.compiled import check_phases
from distmeta.distributed.work import Problem
from distmeta.errors import ConfigError
from distmeta.models import MODELS
from distmeta.tasks import TASKS
from distmeta.tasks.mixture import Mixture, naming
from distmeta.tasks.splits import SPLITS

log = logging.getLogger("distmeta")

_OBJECT = "python:"  # marks a part that was given as a Python object and cannot be built from the configuration
_SUPPLIED = {
    "tasks": ("data_root",),
    "model": ("input_shape", "outputs", "vocabulary", "categorical"),
    "algorithm": (),
}
REGISTRIES: dict[str, dict[str, Callable[..., Any]]] = {"tasks": TASKS, "model": MODELS, "algorithm": ALGORITHMS}


@dataclass
class Experiment:
    """A configuration and what it means."""

    config: Config
    """Complete: every option of every component is there."""
    problem: Problem
    initial: Params
    """The initial meta-parameters under their joined names."""
    outputs: int | None
    """How many classes the model tells apart; None: unknown, or it is no classifier."""


def complete(config: Config) -> Config:
    """The configuration with the defaults of its components filled in, but for those that are no plain data.

    Raises:
        ConfigError: A component is unknown, or an option of it is unknown or of the wrong type.
    """
    update: dict[str, Any] = {}
    for section in ("tasks", "model", "algorithm"):
        component: Component = getattr(config, section)
        if not component.use.startswith(_OBJECT):
            update[section] = _complete(section, component, section)
    return config.model_copy(update=update)


def _complete(key: str, component: Component, section: str) -> Component:
    """One component with its defaults, and where it is a mixture those of its parts."""
    target = find(f"{key}.use", component.use, REGISTRIES[section])
    options = options_of(key, target, component.options, _SUPPLIED[section])
    if target is Mixture:
        parts = _parts(key, options)
        options["of"] = {
            n: _complete(f"{key}.of.{n}", part, section).model_dump(mode="json") for n, part in parts.items()
        }
    kept = {name: value for name, value in options.items() if name in component.options or _is_plain(value)}
    return Component(use=component.use, **kept)


def _parts(key: str, options: Mapping[str, Any]) -> dict[str, Component]:
    """The parts of a mixture, each with what is set in all of them.

    Raises:
        ConfigError: One is no component.
    """
    parts: dict[str, Component] = {}
    replaced: list[str] = []
    for name, part in options["of"].items():
        if not isinstance(part, Mapping) or "use" not in part:
            raise ConfigError(f"{key}.of.{name}: a part is a mapping such as {{use: glyphs, ways: 5}}; given: {part!r}")
        own, each = dict(cast("Mapping[str, Any]", part)), options.get("each") or {}
        replaced += [f"{key}.of.{name}.{k}" for k, value in each.items() if k in own and own[k] != value]
        parts[name] = Component.model_validate(own | each)
    if replaced:
        log.info("%s.each takes the place of %s", key, ", ".join(replaced))
    return parts


def of_objects(config: Config) -> bool:
    """Whether a part of the configuration was given as a Python object, of which it has the name alone."""
    parts = [config.tasks.use, config.model.use, config.algorithm.use, config.loss or ""]
    return any(part.startswith(_OBJECT) for part in parts)


def assemble(
    config: Config,
    *,
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
    outputs: int | None = None,
    prepare: Sequence[Split] = SPLITS,
) -> Experiment:
    """Builds what ``config`` names; an object that is given takes the place of its section.

    ``outputs`` are those of a classifier that was trained on other tasks. ``prepare`` are the splits that tasks will be
    drawn from: without any, data are neither read nor downloaded.

    Raises:
        ConfigError: A part is unknown, refuses its options or does not fit the others.
        DataError: The data are missing, damaged or too few.
    """
    given = {"tasks": tasks, "model": model, "algorithm": algorithm}
    kinds = {"model": (model, nn.Module), "algorithm": (algorithm, MetaAlgorithm)}
    for name, (part, kind) in kinds.items():
        if part is not None and not isinstance(part, kind):
            raise ConfigError(
                f"{name}={_said(part)}: an object of {kind.__name__} is expected; names go into the configuration"
            )
    if loss is not None and not callable(loss):
        raise ConfigError(
            f"loss={_said(loss)}: a function loss(output, target) is expected; names go into the configuration"
        )
    marks: dict[str, Any] = {name: Component(use=_mark(part)) for name, part in given.items() if part is not None}
    if loss is not None:
        marks["loss"] = _mark(loss)
    config = complete(config.model_copy(update=marks))
    tasks = build_part(config, "tasks", data_root=config.data_root) if tasks is None else tasks
    if isinstance(tasks, type):
        raise ConfigError(f"tasks={_said(tasks)}: an object is expected, as in tasks={tasks.__name__}(…)")
    if not callable(getattr(tasks, "sample", None)):
        raise ConfigError(f"tasks must have a method sample(rng, split); {type(tasks).__name__} has none")
    if prepare and callable(getattr(tasks, "prepare", None)):
        cast(Any, tasks).prepare(prepare)
    spec: TaskSpec | None = getattr(tasks, "spec", None)
    ways = spec.outputs if spec is not None and spec.loss == "cross_entropy" else None
    if spec is not None and ways is not None and outputs not in (None, ways):
        spec = spec._replace(outputs=outputs, variable_ways=spec.variable_ways or ways < outputs)
    chosen: MetaAlgorithm = build_part(config, "algorithm") if algorithm is None else algorithm
    if config.train.strategy == "compiled":
        check_phases(chosen, config.train.steps)
    module_loss = _loss(config, model or _model(config, spec), loss, spec, chosen)
    if isinstance(module_loss, PolicyLoss):
        cast(Any, tasks).bind(module_loss)
    with torch.random.fork_rng([]):
        torch.manual_seed(torch_seed(config.seed, "algorithm"))
        initial = join(chosen.init(module_loss.init()))
    _check_outer(chosen, config)
    problem = Problem(
        algorithm=chosen,
        loss=module_loss,
        tasks=cast(TaskDistribution, tasks),
        layout=Layout.of(initial),
        seed=config.seed,
        strategy="loop" if config.train.strategy == "auto" else config.train.strategy,
        on_failure=config.train.on_failure,
        threads=config.scaling.threads_per_worker,
        device="cuda" if config.scaling.use_gpu else "cpu",
        judge=None if spec is None else spec.judge,
        metric=None if spec is None else spec.metric,
        variable_ways=spec is not None and spec.variable_ways,
    )
    experiment = Experiment(config, problem, initial, None if spec is None or ways is None else spec.outputs)
    return experiment if ways is None else of_ways(experiment, ways, "each task has")


def of_ways(experiment: Experiment, ways: int, whose: str) -> Experiment:
    """The experiment for tasks of ``ways`` classes, which may be more than the model has outputs for.

    Args:
        experiment: One of classification.
        ways: How many classes.
        whose: The beginning of the message: what has so many.

    Raises:
        ConfigError: They are more, and the algorithm does not make the head from each support set.
    """
    problem, head = experiment.problem, experiment.problem.algorithm.task_head
    outputs = experiment.outputs if head is None else len(experiment.initial[f"model.{head}.weight"])
    if outputs is None or ways <= outputs:
        return experiment
    if head is None:
        raise ConfigError(
            f"{whose} {ways} classes; this run tells {outputs} apart: take fewer, or train with tasks.ways={ways}, "
            "or by an algorithm that takes any number, since it makes the head from the support set (protomaml, r2d2)"
        )
    assert isinstance(problem.loss, ModuleLoss)
    module = copy.deepcopy(problem.loss.module)
    layer = cast(nn.Linear, module.get_submodule(head))
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(_of_rows(getattr(layer, name).detach(), ways)))
    layer.out_features = ways
    initial = widened(experiment.initial, head, ways)
    problem = replace(
        problem, loss=ModuleLoss(module, problem.loss.criterion, problem.loss.precision), layout=Layout.of(initial)
    )
    return replace(experiment, problem=problem, initial=initial)


def widened(params: Params, head: str, ways: int) -> Params:
    """The meta-parameters with ``ways`` outputs of a head that tasks make themselves; further ones are 0."""
    names = (f"model.{head}.weight", f"model.{head}.bias")
    return params | {name: _of_rows(params[name], ways) for name in names if name in params}


def _of_rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(max(0, rows - len(tensor)), *tensor.shape[1:])])


def _said(part: object) -> str:
    """An object that a user has given, for messages."""
    return f"the class {part.__name__}" if isinstance(part, type) else f"{part!r:.60}"


def _check_outer(algorithm: MetaAlgorithm, config: Config) -> None:
    """Adam's second moment, which Reptile keeps among the meta-parameters, must not become negative."""
    plain = config.outer.use in ("SGD", "torch.optim:SGD") and not config.outer.options.get("momentum")
    averages = plain and not config.outer.stale
    if type(algorithm) is Reptile and algorithm.inner_optimizer == "adam" and not averages:
        raise ConfigError(
            "reptile averages the second moment of its inner Adam over tasks just as theta, which needs plain SGD as "
            f"outer optimizer, without momentum and not stale; given: {config.outer.use}. Set outer.use=SGD "
            "outer.lr=1.0 (its epsilon), or algorithm.inner_optimizer=sgd"
        )


def build_part(config: Config, section: str, **given: Any) -> Any:
    """The object of one section of ``config``."""
    component: Component = getattr(config, section)
    if component.use.startswith(_OBJECT):
        name = component.use.removeprefix(_OBJECT)
        raise ConfigError(f"{section} of this run was the Python object {name}; give it again with {section}=…")
    return _build(section, component, section, given)


def _build(key: str, component: Component, section: str, given: Mapping[str, Any]) -> Any:
    target = find(f"{key}.use", component.use, REGISTRIES[section])
    options = component.options
    if target is Mixture:
        built: dict[str, Any] = {}
        for name, part in _parts(key, options).items():
            with naming(f"{key}.of.{name}"):
                built[name] = _build(f"{key}.of.{name}", part, section, given)
        options |= {"of": built, "each": None}
    return build(key, target, options, **given)


def _is_plain(value: object) -> bool:
    """Whether ``value`` can stand in a configuration file."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _model(config: Config, spec: TaskSpec | None) -> nn.Module:
    given: dict[str, Any] = {}
    if spec is not None:
        given = {"input_shape": spec.input_shape, "outputs": spec.outputs, "vocabulary": spec.vocabulary}
        given["categorical"] = isinstance(spec.loss, ActionSpec) and spec.loss.kind == "categorical"
    if spec is None and config.model.use in MODELS:
        raise ConfigError(
            f"model {config.model.use} must know the tasks' input shape and outputs: give the task distribution a "
            "`spec` (distmeta.TaskSpec), or give a model"
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(torch_seed(config.seed, "model"))
        model = build_part(config, "model", **given)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.use: {config.model.use} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _loss(
    config: Config, model: nn.Module, loss: Criterion | None, spec: TaskSpec | None, algorithm: MetaAlgorithm
) -> PureModule:
    """The loss of the tasks: of outputs and targets, or of a policy."""
    further = "outer.trust_region" if config.outer.trust_region else "outer.passes" if config.outer.passes > 1 else None
    if spec is None or not isinstance(spec.loss, ActionSpec):
        if further is not None:
            raise ConfigError(
                f"{further} goes over data that were sampled with a policy; {config.tasks.use} are no tasks of control"
            )
        return ModuleLoss(model, loss or _criterion(config.loss, spec), config.train.precision)
    if config.train.precision != "float32":
        raise ConfigError(
            f"train.precision={config.train.precision} is for networks of supervised tasks; a policy is too small"
        )
    if loss is not None or config.loss is not None:
        raise ConfigError(f"tasks of control have a loss of their own; leave out loss: {config.loss}")
    if further is not None and not isinstance(algorithm, Bilevel):
        raise ConfigError(
            f"{further} needs an algorithm that descends the query loss, which {config.algorithm.use} is not"
        )
    policy = PolicyLoss(model, spec.loss)
    expected = policy.actions.size(spec.outputs)
    given = tuple(policy.predict(policy.init(), torch.zeros(1, *spec.input_shape)).shape)
    if given != (1, expected):
        raise ConfigError(
            f"model {config.model.use}: a policy for {spec.outputs} {spec.loss.kind} actions puts out {expected} "
            f"numbers an observation; this one gives the shape {given} for one. model.use: policy does"
        )
    return policy


def _criterion(name: str | None, spec: TaskSpec | None) -> Criterion:
    if name is not None and name.startswith(_OBJECT):
        raise ConfigError(f"the loss of this run was the Python object {name}; give it again with loss=…")
    chosen = name if name is not None else None if spec is None else spec.loss
    if chosen is None:
        raise ConfigError(f"the tasks have no `spec` to name their loss; set loss to one of {', '.join(CRITERIA)}")
    return find("loss", chosen, CRITERIA) if isinstance(chosen, str) else chosen


def _mark(part: object) -> str:
    kind = part if callable(part) and hasattr(part, "__qualname__") else type(part)
    return f"{_OBJECT}{kind.__module__}.{kind.__qualname__}"

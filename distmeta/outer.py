"""The outer loop's state: meta-parameters, optimizer and schedule, on the driver."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distmeta.components import build, find
from distmeta.config import Outer
from distmeta.core.params import Layout
from distmeta.core.types import Params
from distmeta.distributed.work import Problem
from distmeta.errors import CheckpointError, ConfigError, DistmetaError, NumericalError, one_line
from distmeta.trust_region import Passes, natural_step

PREVIOUS = "previous"  # among the tensors of a checkpoint


class OuterLoop:
    """theta_t+1 = theta_t − optimizer(g(theta_t)), g the mean meta-gradient: any optimizer and schedule of torch.

    With ``stale`` g(theta_t−1) takes the place of g(theta_t), after a first step with g(theta_0): a gradient delayed by
    one step (Langford, Smola and Zinkevich, 2009, "Slow learners are fast", with tau = 1), which can be computed while
    the update before it is made.

    Args:
        config: The optimizer, its rate and its schedule.
        params: The initial meta-parameters under their joined names.
        layout: How they lie in the flat vectors.

    Raises:
        ConfigError: The optimizer or the schedule is unknown, or refuses its arguments.
    """

    def __init__(self, config: Outer, params: Params, layout: Layout) -> None:
        self.layout, self._settings = layout, config.model_dump(mode="json")
        self.clip_norm, self.passes, self.trust_region = config.clip_norm, config.passes, config.trust_region
        self.stale = config.stale
        self._previous: np.ndarray | None = None  # with stale, theta before the last update
        self.params = {name: torch.nn.Parameter(tensor.detach().cpu().clone()) for name, tensor in params.items()}
        self.optimizer = _optimizer(config, list(self.params.values()))
        self.schedule = None
        if config.schedule is not None:
            target = _find("outer.schedule.use", config.schedule.use, torch.optim.lr_scheduler, LRScheduler)
            if target is ReduceLROnPlateau:
                raise ConfigError(
                    "outer.schedule.use: ReduceLROnPlateau follows a metric; take one that follows the step"
                )
            self.schedule = build("outer.schedule", target, config.schedule.options, optimizer=self.optimizer)
        self.step = 0

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def vector(self) -> np.ndarray:
        """The meta-parameters as one flat vector: a copy, made by one thread, since workers have the cores."""
        return np.concatenate([parameter.detach().numpy().reshape(-1) for parameter in self.params.values()])

    def taken_at(self) -> np.ndarray:
        """Where the meta-gradient of this step is taken, flat: theta, with ``stale`` that before the last update."""
        return self.vector() if self._previous is None else self._previous

    def update(self, gradient: np.ndarray, passes: Passes) -> dict[str, float]:
        """One outer step down the mean meta-gradient, and the further passes over its data that are asked for.

        Returns:
            ``grad_norm`` before clipping, ``lr``, and what the trust region says of the step.

        Raises:
            NumericalError: The gradient or the updated meta-parameters are not finite (see `sound`).
        """
        record: dict[str, float] = {"lr": self.lr}
        previous = self.vector() if self.stale else None
        if self.trust_region is not None:
            record["grad_norm"] = float(torch.from_numpy(gradient).norm())
            gradient, said = natural_step(self.vector(), gradient, passes, self.trust_region)
            record |= said
        before = self._copy() if self.passes > 1 else None
        try:
            for count in range(self.passes):
                norm = self._descend(passes.gradient(self.vector()) if count else gradient)
                record.setdefault("grad_norm", norm)
        except DistmetaError:
            if before is not None:
                self.restore(*before)  # a step half done is no state to go on from
            raise
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        self._previous = previous
        return record

    def _descend(self, gradient: np.ndarray) -> float:
        """One update of the optimizer; the norm of the gradient before clipping."""
        for name, tensor in self.layout.unpack(gradient).items():
            self.params[name].grad = tensor
        largest = float("inf") if self.clip_norm is None else self.clip_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.params.values(), largest))
        if not np.isfinite(norm):
            raise NumericalError(
                f"the mean meta-gradient of step {self.step} has the norm {norm}; lower algorithm.inner_lr or outer.lr"
            )
        self.optimizer.step()
        if not self.sound():
            raise NumericalError(f"the meta-parameters after step {self.step} are not finite; lower outer.lr")
        return norm

    def sound(self) -> bool:
        """Whether all meta-parameters are finite, so that this state is worth keeping."""
        return bool(np.isfinite(self.vector()).all())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next update depends on beside the meta-parameters: tensors, and plain data for JSON."""
        packed = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for index, entries in packed["state"].items():
            for key, value in entries.items():
                (tensors if isinstance(value, Tensor) else plain)[f"{index}.{key}"] = value
        if self._previous is not None:
            tensors[PREVIOUS] = torch.from_numpy(self._previous)
        schedule = self.schedule.state_dict() if self.schedule else None
        return tensors, {
            "step": self.step,
            "optimizer": {"state": plain, "param_groups": packed["param_groups"]},
            "schedule": schedule,
            "settings": self._settings,
        }

    def _copy(self) -> tuple[Params, dict[str, Tensor], dict[str, Any]]:
        """The arguments with which `restore` goes back to here."""
        tensors, plain = copy.deepcopy(self.state())
        return {name: parameter.detach().clone() for name, parameter in self.params.items()}, tensors, plain

    def restore(self, params: Params, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Goes back to a saved state.

        If it was saved with other settings, rates and schedule are those of the settings at hand, as if these had been
        in force from the start; another optimizer, or other options of it, forgets past gradients too.

        Args:
            params, tensors, plain: What was saved.

        Raises:
            CheckpointError: The saved parameters are not those of this model, or what was saved is no state of this
                optimizer and schedule.
        """
        check_same(params, {name: tuple(tensor.shape) for name, tensor in self.params.items()})
        state: dict[int, dict[str, Any]] = {}
        try:
            step, saved = int(plain["step"]), plain["optimizer"]
            before = plain["settings"]
            moments = all(before[key] == self._settings[key] for key in ("use", "options"))
            of_optimizer = {name: tensor for name, tensor in tensors.items() if name != PREVIOUS}
            for name, value in {**of_optimizer, **saved["state"]}.items() if moments else ():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            if self.schedule is not None and before == self._settings:
                self.schedule.load_state_dict(with_keys_of(self.schedule.state_dict(), plain["schedule"]))
            elif self.schedule is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's, of a schedule that is ahead of its optimizer
                    for _ in range(step):
                        self.schedule.step()
            groups = (saved if before == self._settings else self.optimizer.state_dict())["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            for index, parameter in enumerate(self.params.values()):  # torch gives all of them the parameter's type
                kept = {key: value.clone() for key, value in state.get(index, {}).items() if isinstance(value, Tensor)}
                self.optimizer.state[parameter].update(kept)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit the outer optimizer or its schedule ({type(error).__name__}: "
                f"{one_line(error)}); use the configuration that it was trained with"
            ) from error
        with torch.no_grad():
            for name, tensor in params.items():
                self.params[name].copy_(tensor)
        self._previous = tensors[PREVIOUS].numpy().copy() if self.stale and PREVIOUS in tensors else None
        self.step = step


def with_keys_of(own: Any, saved: Any) -> Any:
    """``saved``, which has been JSON, with the keys of ``own``, a state of the same kind.

    JSON has made strings of numbers, as of the milestones of MultiStepLR.
    """
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        mine = cast(Mapping[Any, Any], own)
        keys = {str(key): key for key in mine}
        found = {keys.get(key, key): with_keys_of(mine.get(keys.get(key, key)), value) for key, value in saved.items()}
        return Counter(found) if isinstance(own, Counter) else found
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [with_keys_of(a, b) for a, b in zip(own, saved, strict=True)]
    return saved


def check_same(params: Params, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `CheckpointError` unless ``params`` have the names and ``shapes`` of the model."""
    for name in [*shapes, *params]:
        saved = tuple(params[name].shape) if name in params else None
        if saved != shapes.get(name):
            raise CheckpointError(
                f"the checkpoint does not fit the model: {name} is {saved or 'absent'} in the checkpoint and "
                f"{shapes.get(name) or 'absent'} in the model; use the configuration that it was trained with"
            )


def check_constants(saved: str, problem: Problem) -> None:
    """Raises `CheckpointError` unless the model's frozen parameters and buffers are those of the checkpoint."""
    if saved != problem.loss.constants():
        raise CheckpointError(
            "the checkpoint does not fit the model: its frozen parameters or buffers have other values than in "
            "training; build the model as it was built then (with the same random seed)"
        )


def _optimizer(config: Outer, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    target = _find("outer.use", config.use, torch.optim, torch.optim.Optimizer)
    for key in ("lr", "weight_decay"):
        if key in config.options:
            raise ConfigError(f"outer.options.{key}: set outer.{key} instead")
    if inspect.signature(target.step).parameters["closure"].default is inspect.Parameter.empty:
        raise ConfigError(f"outer.use: {config.use} evaluates the loss anew at each step; take one that does not")
    if issubclass(target, torch.optim.SparseAdam):
        raise ConfigError("outer.use: SparseAdam is for sparse gradients, and meta-gradients are dense; take Adam")
    options = {"lr": config.lr} | ({} if config.weight_decay is None else {"weight_decay": config.weight_decay})
    return build("outer.options", target, options | config.options, params=params)


def _find(key: str, name: str, module: Any, kind: type) -> Any:
    """The public class of torch's ``module`` called ``name`` that is a ``kind``, or one by import string."""
    classes = {n: c for n, c in vars(module).items() if inspect.isclass(c) and n[0] != "_"}
    known = {n: c for n, c in classes.items() if issubclass(c, kind) and c is not kind}
    return find(key, name, known)

"""Search spaces: from YAML in Tune's own vocabulary to Tune's domains, and from a sample to settings of a run.

A space maps settings to distributions, each a mapping of one of Tune's names to its arguments::

    outer.lr: {loguniform: [3e-4, 1e-2]}
    algorithm.inner_steps: {choice: [1, 2, 3]}
    algorithm:
      choice:
        maml: {use: maml, inner_lr: {loguniform: [0.05, 1]}}
        meta-sgd: {use: meta-sgd, inner_lr: {loguniform: [0.01, 0.5]}}

A choice has a list of values, or *alternatives* by name, each a mapping of further settings: constants, or again
distributions. Those conditional dimensions are drawn in every trial, so that all searchers can have them, and count
only where their alternative is chosen. A choice at the top of the space, below no setting, has alternatives with
settings of any section. As in Tune, ``randint`` and ``lograndint`` exclude the upper bound; quantized ones include it.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized

from distmeta.components import nearest
from distmeta.errors import ConfigError, one_line

LISTED = ("choice", "grid_search")
VOCABULARY = (
    "uniform", "quniform", "loguniform", "qloguniform", "randn", "qrandn", "randint", "qrandint", "lograndint",
    "qlograndint", *LISTED,
)  # fmt: skip
FIXED = ("seed", "scaling", "evaluation", "validation", "checkpoint", "name", "run_dir", "data_root")
"""Sections that no trial may have of its own: they decide how trials are compared and where they run."""

Given = tuple[tuple[str, Any], ...]
"""Choices (label, value) that must have been made for something to count."""


@dataclass(frozen=True)
class Dimension:
    """One thing to be drawn."""

    label: str
    """Its name in tables: the key, with the alternative that it belongs to, as in ``algorithm[meta-sgd].inner_lr``."""
    key: str
    """The setting; empty for a choice at the top of the space."""
    domain: Any
    """A `Domain` of Tune, or a mapping ``{"grid_search": [...]}``."""
    alternatives: Mapping[str, Mapping[str, Any]] | None = None
    """If its values are names of alternatives: the constant settings of each, by dotted key."""
    given: Given = ()
    distribution: str = "choice"
    """The name in Tune's vocabulary."""

    @property
    def values(self) -> list[Any] | None:
        """All values, if they are finitely many and listed."""
        if isinstance(self.domain, Domain):
            return list(self.domain.categories) if isinstance(self.domain, Categorical) else None
        return list(self.domain["grid_search"])

    @property
    def logarithmic(self) -> bool:
        """Whether it is drawn on a logarithmic scale."""
        sampler = getattr(self.domain, "sampler", None)
        return isinstance(sampler.get_sampler() if isinstance(sampler, Quantized) else sampler, LogUniform)

    def probes(self) -> list[Any]:
        """Values at which a setting must be valid for the whole dimension to be: all listed ones, or the bounds."""
        if self.values is not None:
            return self.values
        domain = self.domain
        if isinstance(domain, Integer):
            return [domain.lower, domain.upper - (0 if isinstance(domain.get_sampler(), Quantized) else 1)]
        if isinstance(domain, Float) and np.isfinite([domain.lower, domain.upper]).all():
            return [domain.lower, domain.upper]
        return [domain.sample(random_state=seed) for seed in range(8)]  # a normal distribution

    def settings(self, value: Any) -> Mapping[str, Any]:
        """The settings that ``value`` means, by dotted key."""
        return {self.key: value} if self.alternatives is None else self.alternatives[value]

    def sets(self) -> Iterator[tuple[str, Given]]:
        """Each key that it sets, and when."""
        if self.alternatives is None:
            yield self.key, self.given
        for name, settings in (self.alternatives or {}).items():
            for key in settings:
                yield key, (*self.given, (self.label, name))


class Space:
    """The dimensions of a search.

    Args:
        spec: What stands under ``space`` in the file of a search.

    Raises:
        ConfigError: A distribution is unknown or refuses its arguments, or a key is set twice.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.dimensions = list(_dimensions(spec, "", "", ()))
        if not self.dimensions:
            raise ConfigError(
                "space: empty; give at least one setting with a distribution, such as outer.lr: {loguniform: [1e-4, 1]}"
            )
        sets = [(dimension, *entry) for dimension in self.dimensions for entry in dimension.sets()]
        for dimension, key, _ in sets:
            section = key.partition(".")[0]
            if section in FIXED:
                hint = "give seeds: [0, 1, …]" if section == "seed" else f"write it under set: {{{key}: …}}"
                raise ConfigError(f"space.{dimension.label}: {section} is the same for all trials; {hint}")
        for (one, key, given), (other, same, when) in itertools.combinations(sets, 2):
            if key == same and _compatible(given, when):
                raise ConfigError(
                    f"space: {key} is set twice, by {one.label} and by {other.label}; take one of them out"
                )

    def domains(self) -> dict[str, Any]:
        """What Tune takes as its ``param_space``."""
        return {dimension.label: dimension.domain for dimension in self.dimensions}

    @property
    def has_grid(self) -> bool:
        """Whether a dimension is to be tried out value by value."""
        return any(not isinstance(dimension.domain, Domain) for dimension in self.dimensions)

    @property
    def keys(self) -> set[str]:
        """All settings that some trial has of its own."""
        return {key for dimension in self.dimensions for key, _ in dimension.sets()}

    def active(self, sample: Mapping[str, Any]) -> list[Dimension]:
        """The dimensions that count in ``sample``."""
        return [d for d in self.dimensions if all(sample[label] == value for label, value in d.given)]

    def settings(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that ``sample`` (a value for each label) means, by their dotted keys."""
        settings: dict[str, Any] = {}
        for dimension in self.active(sample):
            settings |= dimension.settings(sample[dimension.label])
        return settings

    def short(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """``sample`` for people: the dimensions that count, alternatives by their names."""
        return {d.key or d.label: sample[d.label] for d in self.active(sample)}

    def first(self) -> dict[str, Any]:
        """A sample, for checks: every dimension at the first of its probes."""
        return {dimension.label: dimension.probes()[0] for dimension in self.dimensions}

    def probes(self, random: int = 16) -> Iterator[tuple[str, dict[str, Any]]]:
        """Samples that together visit every listed value and every bound, then ``random`` drawn ones.

        Yields:
            The label of the dimension that is probed (empty for drawn samples), and the sample.
        """
        first = self.first()
        for dimension in self.dimensions:
            for value in dimension.probes():
                yield dimension.label, first | dict(dimension.given) | {dimension.label: value}
        generator = np.random.default_rng(0)
        for _ in range(random):
            yield "", {d.label: _draw(d, generator) for d in self.dimensions}


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """``key=value`` strings, as the command line takes them; those that choose a component come first."""
    ordered = sorted(settings.items(), key=lambda item: (not item[0].endswith(".use"), item[0]))
    return [f"{key}={json.dumps(value, default=lambda number: number.item())}" for key, value in ordered]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys; distributions and empty mappings are left whole."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        inner = isinstance(value, Mapping) and value and _distribution(value) is None
        for found, content in (flat(value, f"{path}.") if inner else {path: value}).items():
            if found in result:
                raise ConfigError(f"{found} stands there twice")
            result[found] = content
    return result


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `flat`: a mapping without dotted keys.

    Raises:
        ConfigError: A key stands there twice, dotted and nested.
    """
    result: dict[str, Any] = {}
    for key, value in flat(settings).items():
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {parent} is a value already")
        if last in place:
            raise ConfigError(f"{key} stands there twice")
        place[last] = value
    return result


def _draw(dimension: Dimension, generator: np.random.Generator) -> Any:
    if dimension.values is not None:
        return dimension.values[generator.integers(len(dimension.values))]
    return dimension.domain.sample(random_state=generator)


def _compatible(given: Given, other: Given) -> bool:
    """Whether both can hold in one sample."""
    return all(value == dict(other).get(label, value) for label, value in given)


def _distribution(value: Any) -> str | None:
    """The name of the distribution that ``value`` stands for; None for a constant."""
    if not isinstance(value, Mapping) or len(value) != 1:
        return None
    (name,) = value
    return name if name in VOCABULARY else None


def _joined(key: str, path: str) -> str:
    return f"{key}.{path}" if key else path


def _dimensions(spec: Mapping[str, Any], key: str, label: str, given: Given) -> Iterator[Dimension]:
    """Those of the settings below ``key``."""
    for name in LISTED:
        if name in spec:
            yield from _dimension(key, _joined(label, name), name, spec[name], given)
    for path, value in flat({k: v for k, v in spec.items() if k not in LISTED}).items():
        name = _distribution(value)
        if name is not None:
            yield from _dimension(_joined(key, path), _joined(label, path), name, value[name], given)
        elif not given:
            known = next(iter(value), "") if isinstance(value, Mapping) else path.rpartition(".")[2]
            raise ConfigError(
                f"space.{_joined(label, path)}: {value!r} is no distribution{nearest(str(known), VOCABULARY)}; give "
                f"one of {', '.join(VOCABULARY)} with its arguments, or write a constant under set"
            )


def _dimension(key: str, label: str, name: str, arguments: Any, given: Given) -> Iterator[Dimension]:
    if name not in LISTED:
        yield Dimension(label, key, _domain(label, name, arguments), given=given, distribution=name)
        return
    if not isinstance(arguments, (list, Mapping)) or not arguments:
        raise ConfigError(
            f"space.{label}: {name} takes a list of values, or alternatives by name; given: {arguments!r}"
        )
    named: dict[str, Any] | None = None
    if isinstance(arguments, Mapping):
        named = {str(k): v for k, v in cast("Mapping[Any, Any]", arguments).items()}
    elif any(isinstance(value, (Mapping, list)) for value in arguments):  # which neither tables nor searchers can hold
        named = {_name(value): value for value in arguments}
    values = list(named) if named is not None else cast("list[Any]", arguments)
    if len({json.dumps(value) for value in values}) < len(arguments):
        raise ConfigError(f"space.{label}: two values of this {name} are the same")
    if not key and (named is None or not all(isinstance(value, Mapping) for value in named.values())):
        raise ConfigError(f"space.{label}: at the top of the space, {name} takes alternatives that are mappings")
    alternatives = None if named is None else {k: _constants(key, v) for k, v in named.items()}
    yield Dimension(label, key, tune.choice(values) if name == "choice" else {name: values}, alternatives, given)
    for value, meaning in (named or {}).items():
        if isinstance(meaning, Mapping):
            yield from _dimensions(meaning, key, f"{label}[{value}]", (*given, (label, value)))


def _constants(key: str, meaning: Any) -> dict[str, Any]:
    """The constant settings of an alternative."""
    if not isinstance(meaning, Mapping):
        return {key: meaning}
    parts = flat({k: v for k, v in meaning.items() if k not in LISTED})
    return {_joined(key, path): value for path, value in parts.items() if _distribution(value) is None}


def _name(value: Any) -> str:
    """What an alternative of a list is called: its ``use`` with its other constants."""
    if not isinstance(value, Mapping):
        return json.dumps(value)
    constants = _constants("", value)
    use = constants.pop("use", None)
    rest = ",".join(f"{k}={json.dumps(v)}" for k, v in constants.items())
    return " ".join(part for part in (use, rest) if part) or json.dumps(value)


def _domain(label: str, name: str, arguments: Any) -> Domain:
    make = getattr(tune, name)
    parameters = [p for p in inspect.signature(make).parameters if p != "base"]
    expected = f"{name} takes [{', '.join(parameters)}]"
    if not isinstance(arguments, list) or not all(
        isinstance(a, (int, float)) and not isinstance(a, bool) and np.isfinite(a) for a in arguments
    ):
        raise ConfigError(f"space.{label}: {expected}, finite numbers; given: {arguments!r}")
    numbers = cast("list[float]", arguments)
    if name not in ("randn", "qrandn") and len(numbers) > 1 and numbers[0] >= numbers[1]:
        raise ConfigError(f"space.{label}: {expected} with lower < upper; given: {numbers!r}")
    if "log" in name and numbers and numbers[0] <= 0:
        raise ConfigError(f"space.{label}: {expected} with lower > 0; given: {numbers!r}")
    if "rand" in name and "randn" not in name and any(n != int(n) for n in numbers):
        raise ConfigError(f"space.{label}: {expected}, whole numbers; given: {numbers!r}")
    try:
        return make(*numbers)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"space.{label}: {expected}; given: {numbers!r} ({one_line(error)})") from error

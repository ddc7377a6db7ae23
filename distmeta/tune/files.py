"""Files of searches: found, read, and checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from distmeta.components import explain, nearest
from distmeta.config import Config, load, packaged, read_yaml
from distmeta.distributed.cluster import demand
from distmeta.errors import ConfigError, DistmetaError, one_line
from distmeta.experiment import assemble
from distmeta.tune.packaged import searches
from distmeta.tune.search import Search
from distmeta.tune.space import flat, nested, overrides
from distmeta.tune.strategies import make_scheduler, make_searcher


def load_search(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> Search:
    """A search from a name of ``tune_configs/``, a YAML file or a mapping, changed by ``key=value`` strings.

    Raises:
        ConfigError: It cannot be read, or a key is unknown, of the wrong type or out of range.
    """
    where = "the search"
    if isinstance(source, Mapping):
        data: dict[str, Any] = {"name": "search"} | dict(source)
    else:
        path = _path_of(source)
        where, data = str(path), {"name": path.stem} | read_yaml(path)
    if isinstance(data.get("set"), Mapping):
        data["set"] = nested(data["set"])  # so that set.train.steps=… meets what stands there as train.steps
    for change in changes:
        if "=" not in change or change.startswith(("=", "-")):
            raise ConfigError(f"{change!r} is not an override; give key=value, for example samples=8")
    try:
        merged = OmegaConf.merge(OmegaConf.create(data), OmegaConf.from_dotlist(list(changes)))
        # Interpolations such as ${train.steps} are those of the trials' configuration, and are resolved there.
        search = Search.model_validate(OmegaConf.to_container(merged, resolve=False))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, Search)}") from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{where} cannot be read: {one_line(error)}") from error
    if isinstance(search.base, str) and search.base not in packaged():
        base = Path(search.base)
        if not base.is_absolute() and not base.exists() and not isinstance(source, Mapping):
            base = _path_of(source).parent / base
        if base.suffix in (".yaml", ".yml") and base.is_file():
            search = search.model_copy(update={"base": {"name": base.stem} | read_yaml(base)})
    try:
        check(search)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return search


def check(search: Search) -> None:
    """Whether every trial that can be drawn is one that ``distmeta train`` would accept.

    Every listed value and every bound is tried, and some samples drawn at random: each is assembled up to the model
    and the algorithm, without data.

    Raises:
        ConfigError: One is not.
    """
    space = search.parsed
    load(search.base, overrides(flat(search.set)))  # before the probes: mistakes in set and base are not the space's
    for key in sorted(
        {d.key for d in space.dimensions if not d.given and d.alternatives is None} & flat(search.set).keys()
    ):
        raise ConfigError(f"{key} stands under set and under space; take it out of one of them")
    if flat(search.set).get("scaling.num_workers") == "auto":
        raise ConfigError("set.scaling.num_workers: a trial needs a number of workers; 0 computes in its own process")
    budgets: set[int] = set()
    workers = flat(search.set).get("scaling.num_workers", 0)
    if workers and not any(demand(load(search.base, overrides(flat(search.set))).scaling).values()):
        raise ConfigError("set.scaling.cpus_per_worker: 0; a trial's workers must be given something to be placed by")
    for label, sample in space.probes():
        where = f"space.{label} = {sample[label]!r}" if label else f"space, at {space.settings(sample)}"
        try:
            config = search.trial_config(sample)
            budgets.add(_budget_of(config))
            if config.train.strategy == "auto":
                raise ConfigError(
                    "train.strategy: auto could choose another one for each trial; set loop, vmap or compiled"
                )
            assemble(config, prepare=())
        except DistmetaError as error:
            raise ConfigError(f"{where}: {error}") from error
    if len(budgets) > 1 and search.scheduler.use != "none":
        raise ConfigError(
            f"train.steps differs between trials ({', '.join(map(str, sorted(budgets)))}), which scheduler.use: "
            f"{search.scheduler.use} compares by their steps; take it out of the space, or take scheduler.use: none"
        )
    make_searcher(search)
    make_scheduler(search)


def _budget_of(config: Config) -> int:
    steps, every = config.train.steps, config.validation.every
    if not every or not steps or steps % every:
        raise ConfigError(
            f"validation.every must divide train.steps, so that each trial ends with a validation; they are {every} "
            f"and {steps}: write both under set"
        )
    return steps


def _path_of(source: str | Path) -> Path:
    known = searches()
    if str(source) in known:
        return known[str(source)]
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"no file {path}")
    raise ConfigError(
        f"no search {str(source)!r}{nearest(str(source), known)}; known are {', '.join(known) or 'none'}, and a path "
        "must end in .yaml"
    )

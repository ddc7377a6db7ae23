"""The configuration of a run: schema, YAML files, dotted overrides.

A configuration is data. Reading one imports nothing but what its ``use`` keys name, and executes nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distmeta.components import Component, explain, nearest, refuse_booleans
from distmeta.errors import ConfigError, one_line

DEFAULT = "glyphs-5way-1shot-maml"
"""The packaged configuration that ``distmeta train`` runs without arguments: offline, minutes on two cores."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrustRegion(Section):
    """A step of natural gradient instead of the meta-gradient's, for control (TRPO)."""

    max_kl: float = Field(
        0.01, gt=0, allow_inf_nan=False, description="greatest mean KL divergence of the adapted policies, old from new"
    )
    cg_steps: int = Field(10, ge=1, description="steps of conjugate gradients")
    damping: float = Field(
        1e-5, ge=0, allow_inf_nan=False, description="multiple of the identity added to the curvature"
    )
    backtracks: int = Field(15, ge=0, description="how often the step is shortened before it is given up")
    shrink: float = Field(0.8, gt=0, lt=1, description="factor of each shortening")


class Outer(Section):
    """The outer loop: how the driver turns the mean meta-gradient into an update."""

    use: str = Field("Adam", description="optimizer of torch.optim, or package.module:Name")
    lr: float = Field(
        1e-3, gt=0, allow_inf_nan=False, description="outer (meta) learning rate; Reptile's epsilon with use: SGD"
    )
    weight_decay: float | None = Field(
        None, ge=0, description="the optimizer's weight decay; null: its own, 0 for most, 0.01 for AdamW"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")
    clip_norm: float | None = Field(None, gt=0, description="largest Euclidean norm of the mean meta-gradient")
    schedule: Component | None = Field(
        None, description="learning-rate schedule of torch.optim.lr_scheduler with its arguments, one step a step"
    )
    passes: int = Field(
        1, ge=1, description="updates an outer step; more than 1, on data sampled once, for control (ProMP, PPO)"
    )
    trust_region: TrustRegion | None = Field(None, description="TRPO, for control, with use: SGD and lr: 1")
    stale: bool = Field(
        False,
        description="meta-gradients are taken at the parameters of one step before, so that workers compute while the "
        "driver sums and updates (docs/performance.md); another algorithm, the same on any number of workers",
    )

    @model_validator(mode="after")
    def _natural(self) -> Outer:
        plain = self.use == "SGD" and self.lr == 1 and not self.options and not self.weight_decay
        if self.trust_region is not None and not (plain and self.clip_norm is None and self.schedule is None):
            raise ConfigError(
                "outer.trust_region finds the whole step itself: it needs use: SGD and lr: 1, without options, "
                "weight_decay, clip_norm or schedule"
            )
        if self.trust_region is not None and self.passes > 1:
            raise ConfigError("outer.trust_region takes one step; leave outer.passes at 1")
        if self.stale and (self.trust_region is not None or self.passes > 1):
            raise ConfigError(
                "outer.stale takes one meta-gradient a step, at older parameters; it does not go with "
                "outer.trust_region or outer.passes above 1, which go over the data again at the present ones"
            )
        return self


class Train(Section):
    """Meta-training."""

    steps: int = Field(1000, ge=0, description="outer steps")
    meta_batch_size: int = Field(32, ge=1, description="tasks of an outer step")
    shard_size: int = Field(8, ge=1, description="tasks of a shard, the unit of work; part of the result's last bits")
    strategy: Literal["loop", "vmap", "compiled", "auto"] = Field(
        "loop",
        description="tasks of a shard one by one, vectorised, or vectorised and compiled; auto: what a trial at the "
        "start finds fastest (docs/performance.md)",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="how exactly the model multiplies; bfloat16: to 8 bits, which is faster where the hardware has it "
        "(docs/performance.md)",
    )
    on_failure: Literal["raise", "skip"] = Field(
        "raise", description="a task whose numbers are not finite, or whose environment fails: stop, or leave it out"
    )
    log_every: int = Field(10, ge=1, description="outer steps between lines of metrics")


class Validation(Section):
    """Evaluation on meta-validation tasks during training, always the same ones."""

    every: int = Field(200, ge=0, description="outer steps between validations; 0: never")
    tasks: int = Field(100, ge=2, description="tasks of each validation, at least 2 for there to be an interval")


class Evaluation(Section):
    """The evaluation on meta-test tasks after training, and by the command evaluate."""

    tasks: int = Field(600, ge=0, description="unseen test tasks; 0: none after training")
    shard_size: int = Field(10, ge=1, description="tasks of a shard")
    baselines: bool = Field(True, description="print the untrained model and nearest neighbours beside it")

    @model_validator(mode="after")
    def _interval(self) -> Evaluation:
        if self.tasks == 1:
            raise ConfigError("evaluation.tasks must be at least 2, for there to be an interval, or 0; given: 1")
        return self


class Checkpoint(Section):
    """What is kept on disk to resume from."""

    every: int = Field(200, ge=1, description="outer steps between checkpoints; the last step has one always")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one by validation")


class Scaling(Section):
    """Who computes. Nothing here changes the resulting parameters, but threads_per_worker and the type of device."""

    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="Ray actors; auto: one per GPU with use_gpu, else per CPU core; 0: this process, no Ray"
    )
    min_workers: int | None = Field(
        None,
        ge=1,
        description="begin with so many, take others in as the cluster grows; null: all must fit at once",
    )
    use_gpu: bool = Field(False, description="each worker computes on a GPU of its own")
    gpus_per_worker: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a GPU that each worker has with use_gpu; it computes on one at most",
    )
    cpus_per_worker: float = Field(1.0, ge=0, description="CPU cores that Ray sets aside for a worker")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="further Ray resources of a worker, for example {a100: 1}"
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="pack: as Ray does, a node is half filled before the next; spread: over all nodes"
    )
    mixed_hardware: bool = Field(
        False, description="take workers of different processors too, though bits then depend on them"
    )
    threads_per_worker: int = Field(1, ge=1, description="threads of torch in a worker; part of the last bits")
    address: str | None = Field(None, description="Ray cluster to join; null: $RAY_ADDRESS, else a local one")
    shard_timeout: float = Field(
        300.0,
        gt=0,
        description="seconds at one shard after which a worker hangs; at least 10 times the slowest one",
    )
    start_timeout: float = Field(
        300.0, gt=0, description="seconds to wait for the first worker, or min_workers of them"
    )

    @model_validator(mode="after")
    def _least(self) -> Scaling:
        if self.min_workers is not None and self.num_workers != "auto" and self.min_workers > self.num_workers:
            raise ConfigError(
                f"scaling.min_workers = {self.min_workers} is more than scaling.num_workers = {self.num_workers}"
            )
        return self


class Config(Section):
    """A whole run: with the seed, all that its result depends on."""

    seed: int = Field(0, ge=0, description="names all random streams of the run")
    tasks: Component = Field(Component(use="glyphs"), description="distribution over tasks")
    model: Component = Field(Component(use="conv4"), description="the network")
    loss: str | None = Field(
        None, description="cross_entropy, mse, token_cross_entropy or package.module:Name; null: the tasks' own"
    )
    algorithm: Component = Field(Component(use="maml"), description="the meta-learning algorithm")
    outer: Outer = Outer()  # pyright: ignore[reportCallIssue]
    train: Train = Train()  # pyright: ignore[reportCallIssue]
    validation: Validation = Validation()  # pyright: ignore[reportCallIssue]
    evaluation: Evaluation = Evaluation()  # pyright: ignore[reportCallIssue]
    checkpoint: Checkpoint = Checkpoint()  # pyright: ignore[reportCallIssue]
    scaling: Scaling = Scaling()  # pyright: ignore[reportCallIssue]
    name: str | None = Field(None, description="name of the run; null: that of the configuration")
    run_dir: str | None = Field(
        None, description="folder of the run, which must be new, or a URL such as s3://bucket/run; null: runs/NAME-TIME"
    )
    data_root: str | None = Field(None, description="folder of data sets; null: $DISTMETA_DATA, else the user's cache")


def packaged() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(str(resources.files("distmeta") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a packaged name, a YAML file or a mapping, changed by ``key.subkey=value`` strings.

    Raises:
        ConfigError: The source is not there or is no YAML, or a key is unknown, of the wrong type or out of range.
    """
    with _readable():
        settings = OmegaConf.create(merge(source, overrides))
        for text in _strings(OmegaConf.to_container(settings, resolve=False)):
            if _calls(text):
                raise ConfigError(
                    f"the configuration calls {text!r}: it may refer to its own keys, as ${{train.steps}} does, and to "
                    "nothing else (variables of the environment may hold secrets, and run folders are passed on)"
                )
        plain = OmegaConf.to_container(settings, resolve=True)
    return validate(plain)


def merge(source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of ``source`` and ``overrides``, unchecked, with interpolations such as ``${train.steps}`` in them.

    An override of the ``use`` of a component by another one drops the options that the source gives the one before.

    Raises:
        ConfigError: The source is not there or is no YAML, or an override is none.
    """
    if source is None:
        source = DEFAULT
    if isinstance(source, Mapping):
        data: dict[str, Any] = dict(source)
    else:
        path = _path_of(source)
        data = {"name": path.stem} | read_yaml(path)
    changes = OmegaConf.create({})
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise ConfigError(f"{override!r} is not an override; give key=value, for example train.steps=100")
        with _readable(repr(override)):
            changes.merge_with_dotlist([override])
    with _readable():
        start = OmegaConf.create(data)
        for section in (name for name, field in Config.model_fields.items() if isinstance(field.default, Section)):
            given = OmegaConf.select(changes, section)
            if given is not None and not OmegaConf.is_config(given):
                raise ConfigError(f"{section} holds settings of its own, as in {section}.KEY=VALUE; given: {given!r}")
        for component in ("tasks", "model", "algorithm", "outer.schedule"):
            use = OmegaConf.select(changes, f"{component}.use")
            if use is not None and use != OmegaConf.select(start, f"{component}.use"):
                OmegaConf.update(start, component, {}, merge=False)  # options of another component would be wrong
        container = OmegaConf.to_container(OmegaConf.merge(start, changes), resolve=False)
    return {str(key): value for key, value in cast("dict[Any, Any]", container).items()}


@contextmanager
def _readable(what: str = "the configuration") -> Generator[None]:
    """Turns what OmegaConf raises into a `ConfigError` that says what it was at."""
    try:
        yield
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{what} cannot be read: {one_line(error)}") from error


def _strings(data: object) -> Generator[str]:
    """All values that are strings."""
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        if isinstance(value, str):
            yield value
        else:
            yield from _strings(value)


def _calls(text: str) -> bool:
    """Whether there is a colon within ``${…}``, where OmegaConf would call one of its resolvers."""
    depth = 0
    for i, sign in enumerate(text):
        depth += text[i : i + 2] == "${"
        depth -= sign == "}" and depth > 0
        if sign == ":" and depth:
            return True
    return False


def validate(data: object) -> Config:
    """The configuration that plain data means.

    Raises:
        ConfigError: A key is unknown, of the wrong type or out of range.
    """
    if isinstance(data, Mapping):
        refuse_booleans(data, Config)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values; it holds a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def _path_of(source: str | Path) -> Path:
    names = packaged()
    if str(source) in names:
        return names[str(source)]
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise ConfigError(f"no configuration file {path}")
        return path
    if str(source).partition(".")[0] in Config.model_fields:
        raise ConfigError(f"{str(source)!r} is not an override; give key=value, for example train.steps=100")
    raise ConfigError(
        f"no packaged configuration {str(source)!r}{nearest(str(source), names)}; "
        "`distmeta config` lists them, and a path must end in .yaml"
    )

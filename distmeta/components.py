"""Parts that a configuration names: ``{use: NAME, option: value, …}`` and the objects built from them.

``NAME`` is a registered name or an import string ``package.module:Name`` of a class or function of the user's own. Its
signature is the schema: types are checked against its annotations, unknown options are refused, and a string in
``Annotated[type, "…"]`` is the option's documentation.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from distmeta.errors import ConfigError, DistmetaError, nearest, one_line


class Component(BaseModel):
    """``use`` names what to build; every other key is an option of it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    use: str

    @property
    def options(self) -> dict[str, Any]:
        """All keys but ``use``."""
        return dict(self.model_extra or {})


def find(section: str, name: str, registry: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The class or function called ``name``: one of ``registry``, or one imported by ``package.module:Name``.

    What the registry knows as ``kind:`` is called with what stands behind the colon, as in ``hf:PATH``.

    Raises:
        ConfigError: There is none of that name; the message gives the nearest known one.
    """
    if name in registry:
        return registry[name]
    kind, _, source = name.partition(":")
    if f"{kind}:" in registry:
        return functools.partial(registry[f"{kind}:"], source)
    if ":" not in name:
        raise ConfigError(
            f"{section}: {name!r} is not known{nearest(name, registry)}; known are {', '.join(sorted(registry))}, "
            "and your own as 'package.module:Name'"
        )
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # a module here is found as `python -m` would find it
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{section}: {name!r} cannot be imported: {error}") from error


def schema(target: Callable[..., Any], given: Iterable[str] = ()) -> type[BaseModel]:
    """The options of ``target`` as a pydantic model, without the arguments ``given`` that the program supplies."""
    parameters = inspect.signature(target).parameters.values()
    bound = target
    if isinstance(bound, functools.partial):
        bound = bound.func
    # A dataclass's fields are annotated in the modules of the classes that they come from.
    scope = bound if is_dataclass(bound) or not inspect.isclass(bound) else bound.__init__
    try:
        hints = get_type_hints(scope, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read
        hints = {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    fields: dict[str, Any] = {}
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in given:
            continue
        fields[p.name] = (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
    config = ConfigDict(
        extra="allow" if open_ended else "forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )
    return create_model(getattr(target, "__name__", "options"), __config__=config, **fields)


def options_of(
    section: str, target: Callable[..., Any], options: Mapping[str, Any], given: Iterable[str] = ()
) -> dict[str, Any]:
    """``options`` checked against the signature of ``target`` and completed with its defaults.

    Raises:
        ConfigError: An option is unknown, missing or of the wrong type.
    """
    model = schema(target, given)
    refuse_booleans(options, model, section)
    try:
        return dict(model.model_validate(dict(options)))
    except ValidationError as error:
        raise ConfigError(explain(error, model, section)) from error


def refuse_booleans(data: Mapping[str, Any], model: type[BaseModel], section: str = "") -> None:
    """Raises `ConfigError` where ``true`` or ``false`` stands for a number, as pydantic would take it: 1 or 0."""
    for key, value in data.items():
        field, name = model.model_fields.get(str(key)), f"{section}.{key}" if section else str(key)
        if field is None:
            continue
        if (
            isinstance(value, bool)
            and _mentions(field.annotation, int, float)
            and not _mentions(field.annotation, bool)
        ):
            raise ConfigError(f"{name}: input should be a number; given: {value}")
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(value, Mapping) and inspect.isclass(inner) and issubclass(inner, BaseModel):
                refuse_booleans(value, inner, name)


def _mentions(annotation: Any, *kinds: Any) -> bool:
    return annotation in (*kinds, Any) or any(_mentions(inner, *kinds) for inner in get_args(annotation))


def build(section: str, target: Callable[..., Any], options: Mapping[str, Any], **given: Any) -> Any:
    """Calls ``target`` with checked options and with those of ``given`` that it has parameters for.

    Raises:
        ConfigError: An option is unknown, missing, of the wrong type or out of range.
    """
    parameters = inspect.signature(target).parameters
    supplied = {key: value for key, value in given.items() if key in parameters}
    checked = options_of(section, target, options, supplied)
    try:
        return target(**checked, **supplied)
    except DistmetaError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        name = getattr(target, "__name__", section)
        raise ConfigError(f"{section}: {name} refused its options: {one_line(error)}") from error


def documentation(target: Callable[..., Any], given: Iterable[str] = ()) -> dict[str, str]:
    """For each option of ``target`` the string in its annotation, or an empty one."""
    docs: dict[str, str] = {}
    for name, field in schema(target, given).model_fields.items():
        texts = [m for m in field.metadata if isinstance(m, str)]
        if not texts and get_origin(field.annotation) is Annotated:
            texts = [m for m in get_args(field.annotation)[1:] if isinstance(m, str)]
        docs[name] = texts[0] if texts else (field.description or "")
    return docs


def explain(error: ValidationError, model: type[BaseModel], section: str = "") -> str:
    """The first complaints of pydantic as one line in terms of configuration keys.

    Where each member of a union has refused a value, what they want is one complaint.
    """
    wanted: dict[str, list[str]] = {}
    complaints: dict[str, str] = {}
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        key = ".".join(([section] if section else []) + [part for part in where if not _is_branch(part)])
        kind, cause = problem["type"], problem.get("ctx", {}).get("error")
        if isinstance(cause, DistmetaError):
            complaints[str(cause)] = str(cause)
        elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _keys_at(model, where[:-1])
            hint = nearest(where[-1], known) or (f"; known are {', '.join(sorted(known))}" if known else "")
            complaints[key] = f"{key}: unknown key{hint}"
        elif kind == "missing":
            complaints[key] = f"{key}: missing; it has no default"
        else:
            wanted.setdefault(key, []).append(_plain(problem["msg"]))
            complaints[key] = f"{key}: {' or '.join(dict.fromkeys(wanted[key]))}; given: {problem['input']!r}"
    return "; ".join(list(complaints.values())[:4])


_WORDS = {
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary or instance of Component": "settings, {use: NAME, option: value}",
    "a valid dictionary": "settings, {key: value}",
}


def _is_branch(part: str) -> bool:
    """Whether pydantic put ``part`` in to name a member of a union."""
    return part in ("int", "float", "str", "bool", "none", "constrained-int", "Component") or "[" in part


def _plain(message: str) -> str:
    """What pydantic says, within a line, and in YAML's words."""
    message = message[0].lower() + message[1:]
    for pythons, yamls in _WORDS.items():
        message = message.replace(pythons, yamls)
    return message


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)

"""A configuration printed whole, every key with what it means, as YAML that ``distmeta train`` takes."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from distmeta.components import Component, documentation, find
from distmeta.config import Config
from distmeta.experiment import REGISTRIES, complete
from distmeta.tasks.mixture import Mixture


def explain_config(config: Config) -> str:
    """YAML of all settings, defaults too, each beside its documentation."""
    return "\n".join(_lines(complete(config), "")) + "\n"


def _lines(section: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        doc = field.description or ""
        if isinstance(value, Component) and key in REGISTRIES:
            target = find(f"{key}.use", value.use, REGISTRIES[key])
            known = ", ".join(sorted(REGISTRIES[key]))
            lines += ["", f"{indent}{key}:  # {doc}", f"{indent}  use: {value.use}  # {known}, or package.module:Name"]
            lines += _options(value, target, key, indent + "  ")
        elif isinstance(value, Component):
            lines.append(_line(indent, key, value.model_dump(mode="json"), doc))
        elif isinstance(value, BaseModel):
            summary = (type(value).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{indent}{key}:  # {summary}", *_lines(value, indent + "  ")]
        else:
            lines.append(_line(indent, key, value, doc))
    return lines


def _options(component: Component, target: Any, section: str, indent: str) -> list[str]:
    """The options of a component, the parts of a mixture each with its own."""
    lines: list[str] = []
    docs = documentation(target)
    for name, option in component.options.items():
        if target is Mixture and name == "of":
            lines.append(f"{indent}of:  # {docs[name]}")
            for part, settings in option.items():
                inner = Component.model_validate(settings)
                kind = find(f"{section}.of.{part}.use", inner.use, REGISTRIES[section])
                about = (kind.__doc__ or "").strip().partition("\n")[0]
                lines += [f"{indent}  {part}:  # {about}", f"{indent}    use: {inner.use}  # as {section}.use"]
                lines += _options(inner, kind, section, indent + "    ")
        else:
            lines.append(_line(indent, name, option, docs.get(name, "")))
    return lines


def _line(indent: str, key: str, value: Any, doc: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    return f"{indent}{key}: {text}" + (f"  # {doc}" if doc else "")

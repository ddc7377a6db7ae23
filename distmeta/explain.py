"""A configuration printed whole, every key with what it means, as YAML that ``distmeta train`` takes."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from distmeta.components import Component, documentation, find
from distmeta.config import Config
from distmeta.experiment import REGISTRIES, complete


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
            docs = documentation(target)
            lines += [_line(f"{indent}  ", name, option, docs.get(name, "")) for name, option in value.options.items()]
        elif isinstance(value, Component):
            lines.append(_line(indent, key, value.model_dump(mode="json"), doc))
        elif isinstance(value, BaseModel):
            summary = (type(value).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{indent}{key}:  # {summary}", *_lines(value, indent + "  ")]
        else:
            lines.append(_line(indent, key, value, doc))
    return lines


def _line(indent: str, key: str, value: Any, doc: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    return f"{indent}{key}: {text}" + (f"  # {doc}" if doc else "")

"""Where a pretrained model lies that a configuration names by ``hf:SOURCE``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from distmeta.errors import ConfigError

MISSING = "pip install 'distmeta[text]' brings what texts and pretrained encoders need"
"""What to do where an optional library is not installed."""


def locate(source: str) -> str:
    """The folder that ``source`` means, or ``source`` itself where it is a name for the Hugging Face hub.

    Args:
        source: A folder (``~`` is the home); or ``PACKAGE:FOLDER``, a folder inside an installed Python package; or a
            name that the hub knows, which the library downloads.

    Raises:
        ConfigError: There is no such folder or package.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    package, colon, inner = source.partition(":")
    if colon:
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        roots = [] if found is None else list(found.submodule_search_locations or [])
        for root in roots:
            if (Path(root) / inner).is_dir():
                return str(Path(root) / inner)
        reason = f"has no folder {inner!r}" if roots else "is not installed"
        raise ConfigError(f"hf:{source}: the Python package {package!r} {reason}; give a folder, or PACKAGE:FOLDER")
    if source.startswith((".", "/", "~")) or not source:
        raise ConfigError(f"hf:{source}: there is no folder {folder}")
    return source

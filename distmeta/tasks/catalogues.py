"""Pairs of sentences from gettext's message catalogues, in which programs keep their translations."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distmeta.core.pretrained import MISSING
from distmeta.errors import ConfigError, DataError, one_line

SUFFIXES = (".po", ".mo")
_FOLDER = "LC_MESSAGES"  # LANGUAGE/LC_MESSAGES/DOMAIN.mo is where gettext looks for catalogues


class Message(NamedTuple):
    """A translated message."""

    translation: str
    original: str
    place: str


def messages(path: Path) -> Iterator[Message]:
    """The translated messages of a ``.po`` or ``.mo`` file, and of those with plural forms the singular and the plural.

    What is fuzzy or obsolete, has no translation, or is translated by itself, is left out.

    Raises:
        ConfigError: Babel, which reads the files, is not installed.
        DataError: The file cannot be read, or is no catalogue.
    """
    try:
        from babel.messages.mofile import read_mo
        from babel.messages.pofile import PoFileError, read_po
    except ImportError as error:
        raise ConfigError(f"catalogues of messages are read by the library Babel; {MISSING}") from error
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".mo":
                catalogue = read_mo(file)
            else:
                catalogue = read_po(file, ignore_obsolete=True, abort_invalid=True)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, struct.error, ValueError, PoFileError) as error:  # a wrong encoding is a ValueError
        raise DataError(f"{path} cannot be read as a catalogue of messages: {one_line(error)}") from error
    for message in catalogue:
        if not message.id or message.fuzzy:  # the message without a text is the catalogue's own header
            continue
        place = f"{path}, line {message.lineno}" if message.lineno else str(path)
        originals, translations = (
            list(part) if isinstance(part, list | tuple) else [part] for part in (message.id, message.string)
        )
        if len(originals) > 1:  # the last form is of many; languages with a single one use it for one thing, too
            translations = translations[:1] * (len(translations) > 1) + translations[-1:]
            originals = originals[-len(translations) :]
        for original, translation in zip(originals, translations, strict=True):
            if original and translation and translation != original:
                yield Message(translation, original, place)


def by_language(folder: Path) -> dict[str, list[Path]]:
    """The catalogues under a folder that lie as gettext wants them, ``LANGUAGE/LC_MESSAGES/DOMAIN.mo`` or ``.po``.

    Where a catalogue is there in both forms, the ``.po`` file is left out.
    """
    found: dict[str, dict[Path, Path]] = {}
    for suffix in SUFFIXES:  # .mo files, which come second, take the place of .po files
        for path in sorted(folder.rglob(f"{_FOLDER}/*{suffix}")):
            found.setdefault(path.parents[1].name, {})[path.with_suffix("")] = path
    return {language: list(files.values()) for language, files in sorted(found.items())}

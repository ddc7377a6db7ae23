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

    What is fuzzy or obsolete, has no translation, or is translated by itself, is left out. White space, by which
    messages are laid out, is given as single spaces.

    Raises:
        ConfigError: polib, which reads the files, is not installed.
        DataError: The file cannot be read, or is no catalogue.
    """
    try:
        import polib
    except ImportError as error:
        raise ConfigError(f"catalogues of messages are read by the library polib; {MISSING}") from error
    if not path.is_file():  # polib would take the path for the text of a catalogue
        raise DataError(f"there is no file {path}")
    try:
        catalogue = polib.mofile(str(path)) if path.suffix.lower() == ".mo" else polib.pofile(str(path))
    except (OSError, struct.error, ValueError) as error:  # a wrong encoding is a ValueError
        raise DataError(f"{path} cannot be read as a catalogue of messages: {one_line(error)}") from error
    for entry in catalogue.translated_entries():
        pairs = [(entry.msgid, entry.msgstr)]
        if entry.msgid_plural:  # the last form is of many; languages with a single one use it for one thing, too
            forms = [entry.msgstr_plural[number] for number in sorted(entry.msgstr_plural)]
            pairs = [(entry.msgid, forms[0])] * (len(forms) > 1) + [(entry.msgid_plural, form) for form in forms[-1:]]
        place = f"{path}, line {entry.linenum}" if isinstance(entry, polib.POEntry) else str(path)
        for pair in pairs:
            original, translation = (" ".join(text.split()) for text in pair)
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

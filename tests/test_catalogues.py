"""Message catalogues of programs as pairs of sentences."""

from __future__ import annotations

from pathlib import Path

import polib
import pytest

from distmeta.core.seeds import stream
from distmeta.errors import DataError
from distmeta.tasks.catalogues import by_language, messages
from distmeta.tasks.translation import ParallelText, decode, pairs_of

GERMAN = r"""
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"
"PO-Revision-Date: 2007-10-08 14:24 South Africa Standard Time\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\n"

#: models.py:7
msgid "Save and continue"
msgstr "Speichern und \n"
"weiter"

msgctxt "month"
msgid "May"
msgstr "Mai"

#, fuzzy
msgid "Guessed"
msgstr "Geraten"

msgid "Nobody has done this"
msgstr ""

msgid "OK"
msgstr "OK"

#, python-format
msgid "%(count)d file"
msgid_plural "%(count)d files"
msgstr[0] "%(count)d Datei"
msgstr[1] "%(count)d Dateien"

#~ msgid "Gone"
#~ msgstr "Weg"
"""
PAIRS = [
    ("Speichern und weiter", "Save and continue"),
    ("Mai", "May"),
    ("%(count)d Datei", "%(count)d file"),
    ("%(count)d Dateien", "%(count)d files"),
]


def compiled(po: str, path: Path) -> Path:
    """The ``.mo`` file of a catalogue, as a program is shipped with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    polib.pofile(po).save_as_mofile(str(path))
    return path


def test_both_forms_of_a_catalogue_give_its_translated_messages(tmp_path: Path) -> None:
    written = tmp_path / "de.po"
    written.write_text(GERMAN, encoding="utf-8")
    found = list(messages(written))
    assert [message[:2] for message in found] == PAIRS
    assert found[0].place == f"{written}, line 8"
    assert sorted(pair[:2] for pair in pairs_of(compiled(GERMAN, tmp_path / "de.mo"))) == sorted(PAIRS)


def test_the_last_plural_form_is_that_of_many(tmp_path: Path) -> None:
    expected = {"cs": [("den", "day"), ("dnů", "days")], "ja": [("日", "days")]}
    for language, forms in {"cs": ("den", "dny", "dnů"), "ja": ("日",)}.items():
        catalogue = polib.POFile(encoding="utf-8")
        catalogue.append(polib.POEntry(msgid="day", msgid_plural="days", msgstr_plural=dict(enumerate(forms))))
        catalogue.save(str(tmp_path / f"{language}.po"))
        catalogue.save_as_mofile(str(tmp_path / f"{language}.mo"))
        for suffix in ("po", "mo"):
            assert [found[:2] for found in messages(tmp_path / f"{language}.{suffix}")] == expected[language]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.po", b"no catalogue at all\n"),
        ("x.po", b'msgid "a"\nmsgstr "\xff"\n'),
        ("x.mo", b"no catalogue at all"),
        ("x.mo", b""),
    ],
)
def test_broken_catalogues_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read as a catalogue of messages: "):
        list(messages(tmp_path / name))
    with pytest.raises(DataError, match=r"there is no file .*none\.po"):
        list(messages(tmp_path / "none.po"))


def test_catalogues_as_gettext_lays_them_out(tmp_path: Path) -> None:
    """Those of several programs, some in both forms; a language with too few messages is left out."""
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnop"]

    def catalogue(mark: str, words: list[str]) -> str:
        header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
        return header + "".join(f'msgid "{word}"\nmsgstr "{mark}{word}"\n\n' for word in words)

    for language in ("cs", "de", "fr", "pt_BR"):
        for number, program in enumerate(("one", "other")):
            folder = tmp_path / program / "locale" / language / "LC_MESSAGES"
            text = catalogue(language, words[number::2])
            compiled(text, folder / f"{program}.mo")
            (folder / f"{program}.po").write_text(text)
    compiled(catalogue("x", words[:5]), tmp_path / "one" / "locale" / "xx" / "LC_MESSAGES" / "one.mo")
    files = by_language(tmp_path)
    assert list(files) == ["cs", "de", "fr", "pt_BR", "xx"]
    assert [path.name for path in files["cs"]] == ["one.mo", "other.mo"]

    settings = {"path": str(tmp_path), "val": ("fr",), "test": ("pt_BR",), "shots": 8, "queries": 4, "length": 8}
    tasks = ParallelText(**settings, least=40)
    tasks.prepare()
    assert tasks.describe() == "192 pairs, languages: train 2, val 1, test 1"
    source, _, target = tasks.sample(stream(0), "test").query_set
    assert decode(source) == [f"pt_BR{word}" for word in decode(target)]
    with pytest.raises(DataError, match=r"xx of parallel \(train\) has 5 pairs and 0 of new targets, too few"):
        ParallelText(**settings).prepare()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tsv, \.jsonl, \.po or \.mo files, and no catalogues in LANGUAGE/"):
        ParallelText(**(settings | {"path": str(tmp_path / "empty")})).prepare()


def test_a_catalogue_is_adapted_to_without_its_long_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "de.po").write_text(GERMAN, encoding="utf-8")
    tasks = ParallelText(path=str(tmp_path), val=(), test=(), length=18)
    own = tasks.own_task(tmp_path / "de.po", compiled(GERMAN, tmp_path / "de.mo"))
    assert decode(own.support[2]) == ["May", "%(count)d file", "%(count)d files"]
    assert sorted(own.sources) == ["%(count)d Datei", "%(count)d Dateien", "Mai"]
    assert own.references is not None and sorted(own.references) == sorted(decode(own.support[2]))
    assert "de.po: 1 of 4 messages are left out, which are longer than tasks.length = 18 bytes" in caplog.text

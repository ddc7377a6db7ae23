"""Translation of the names that the Unicode Common Locale Data Repository (CLDR) has in some 200 languages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from distmeta.core.pretrained import MISSING
from distmeta.core.types import Split
from distmeta.errors import ConfigError
from distmeta.tasks.translation import FewShotTranslation, Pair


@dataclass(eq=False, kw_only=True)
class CLDRNames(FewShotTranslation):
    """Names of languages, countries, currencies, scripts, months, days and units in some 200 languages, into English.

    They come with the library Babel, from the Unicode Common Locale Data Repository (CLDR). Languages with fewer than
    ``least`` names are left out.
    """

    least: Annotated[int, "Names that a language must have."] = 300
    val: Annotated[tuple[str, ...], "Languages for meta-validation."] = ("da", "ro", "bg", "et")
    test: Annotated[tuple[str, ...], "Languages for meta-testing."] = ("nl", "pt", "cs", "uk", "el", "tr", "fi", "id")

    name: ClassVar[str] = "cldr"

    def held_out(self) -> dict[Split, tuple[str, ...]]:
        """As the settings say."""
        return {"val": self.val, "test": self.test}

    def source_key(self) -> str:
        """Babel's version."""
        try:
            import babel
        except ImportError as error:
            raise ConfigError(f"tasks cldr need the library Babel; {MISSING}") from error
        return f"2 babel {babel.__version__} {self.length} {self.new_targets} {self.least}"

    def read(self) -> Iterator[tuple[str, Iterable[Pair]]]:
        """The names of each language, in the order of the languages' codes."""
        from babel import Locale
        from babel.localedata import locale_identifiers

        english = _names(Locale("en"))
        for code in sorted(locale_identifiers()):
            if "_" in code or code == "en":  # variants of a language have much the same names
                continue
            own = _names(Locale.parse(code))
            pairs = [Pair(own[key], english[key], f"{code} {key}") for key in english if key in own]
            if len(pairs) >= self.least:
                yield code, pairs


def _names(locale: Any) -> dict[str, str]:
    """All names of a locale by kind and code."""
    found: dict[str, str] = {}
    for kind in ("languages", "territories", "scripts", "currencies"):
        found |= {f"{kind} {code}": name for code, name in getattr(locale, kind).items()}
    for kind, names in (("month", locale.months), ("day", locale.days)):
        found |= {f"{kind} {number}": name for number, name in names["format"]["wide"].items()}
    units = locale._data["unit_display_names"]  # Babel has no public way to list them
    found |= {f"unit {code}": name for code, name in units.items() if isinstance(name, str)}
    return {key: name for key, name in found.items() if isinstance(name, str) and name.split() != key.split()[-1:]}

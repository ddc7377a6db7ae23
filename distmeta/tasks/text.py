"""Few-shot classification of texts: a user's own files, and the intents of CLINC150."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.seeds import stream
from distmeta.core.types import Split, TaskSpec
from distmeta.errors import ConfigError, DataError, told
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.datasets import FewShotClasses
from distmeta.tasks.files import download
from distmeta.tasks.own import OwnClasses, truth_of_all
from distmeta.tasks.splits import (
    SPLITS,
    USUAL,
    Fractions,
    by_fractions,
    check_fractions,
    listed,
    read_json,
    read_lists,
)
from distmeta.tasks.tables import Text, texts
from distmeta.tasks.tokens import Tokenizer, normal, table, tokenizer_of

log = logging.getLogger("distmeta")


@dataclass(eq=False, kw_only=True)
class FewShotText(FewShotClasses):
    """N-way K-shot classification of texts, which the data set holds as numbers of tokens, int32 [n, length].

    Each text is tokenised once; −1 stands behind its end. Texts without any token and a class's duplicates (without
    regard to case, width and spaces) are left out and counted.

    Raises:
        ConfigError: a field is out of range.
    """

    length: Annotated[int, "Tokens of a text; longer ones are cut, shorter ones padded."] = 32
    tokenizer: Annotated[
        str, "words (hashed), bytes, or hf:SOURCE, the tokenizer of a pretrained model (see model hf:)."
    ] = "words"
    buckets: Annotated[int, "Numbers that the tokenizer words hashes to."] = 8192
    trim: Annotated[
        bool,
        "Cut the padding that all texts of a set share: faster, but shapes differ, so that train.strategy: vmap has "
        "little to vectorise.",
    ] = False
    text_column: Annotated[str, "Column (CSV) or key (JSONL) of the text."] = "text"
    label_column: Annotated[str, "Column or key of the class."] = "label"

    examples: ClassVar[str] = "texts"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("length", "buckets"):
            if getattr(self, key) < 1:
                raise ConfigError(f"tasks.{key} is {getattr(self, key)}; it must be 1 or more")

    @abstractmethod
    def read(self) -> Iterable[Text]:
        """All texts; a text's label is the name of its class."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that `read` reads.

        Raises:
            DataError: one is missing.
        """

    @property
    def outsiders(self) -> dict[Split, str]:
        """By split the group of the data set whose texts fit none of the classes; empty: there are none."""
        return {}

    @cached_property
    def tokens(self) -> Tokenizer:
        """The tokenizer."""
        return tokenizer_of(self.tokenizer, self.buckets)

    @property
    def spec(self) -> TaskSpec:
        """What a model is built for: rows of ``length`` tokens, one output a class, cross-entropy."""
        return TaskSpec(
            (self.length,),
            self.most_ways,
            "cross_entropy",
            self.tokens.vocabulary,
            variable_ways=self.variable_ways,
        )

    def source_key(self) -> str:
        """Names, sizes and times of the files, and what makes tokens of them."""
        stats = [(file, file.stat()) for file in self.files()]
        lines = [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
        return "\n".join([*lines, f"{self.text_column} {self.label_column} {self.length} {self.tokens.key}"])

    def build(self) -> ExampleSet:
        """The tokens of all texts, class by class in the order of the classes' names."""
        by_class, empty, twice = _group(self.read())
        if not by_class:
            raise DataError(f"{self.files()[0]} holds no texts")
        names = sorted(by_class)
        lists = self.tokens([text for name in names for text in by_class[name]], self.length + 1)
        cut = sum(len(tokens) > self.length for tokens in lists)
        if empty:
            log.warning("%s empty and left out%s", *told(empty, "text is", "texts are"))
        if twice:
            log.warning(
                "%s more than once in a class; one of each is taken%s", *told(twice, "text stands", "texts stand")
            )
        if cut:
            lists = self.tokens([text for name in names for text in by_class[name]], self.length)
            log.warning("%d of %d texts are longer than tasks.length = %d tokens and cut", cut, len(lists), self.length)
        counts = np.array([len(by_class[name]) for name in names], np.int64)
        return ExampleSet(table(lists, self.length), tuple(names), counts)

    def describe(self) -> str:
        """How many classes each split has, and how many texts are of none."""
        none = sum(int(self.dataset.counts[self._group_of(name)]) for name in {*self.outsiders.values()})
        return super().describe() + (f"; {none:,} that fit none" if none else "")

    def outside(self, rng: np.random.Generator, split: Split) -> tuple[Tensor, ...]:
        """As many different texts out of scope as a task of ``split`` has queries, or all that there are."""
        if not self.outsiders:
            raise ConfigError(
                f"{self.name} has no texts out of scope here: clinc150 has, and your own with tasks.out_of_scope=LABEL"
            )
        group = self._group_of(self.outsiders[split])
        count, (ways, _, queries) = int(self.dataset.counts[group]), self._most(split)
        drawn = rng.choice(count, min(count, ways * queries), replace=False)
        return (self.inputs(self.dataset.examples[self.dataset.starts[group] + drawn]),)

    def _group_of(self, name: str) -> int:
        return self.dataset.names.index(name)

    def inputs(self, examples: NDArray[Any]) -> Tensor:
        """int64 [n, length], or as many columns as the longest text has tokens."""
        longest = int((examples >= 0).any(0).sum()) if self.trim else self.length
        return torch.from_numpy(examples[:, :longest].astype(np.int64))

    def own_task(self, support: Path, query: Path) -> OwnClasses:
        """From CSV or JSONL files of texts and labels, or class folders; the query may lack labels, or be a .txt file
        with a text on each line."""
        known = [_not_empty(text) for text in texts(support, self.text_column, self.label_column, labelled=True)]
        asked = [_not_empty(text) for text in texts(query, self.text_column, self.label_column, labelled=False)]
        for path, read in ((support, known), (query, asked)):
            if not read:
                raise DataError(f"{path} holds no texts")
        names = sorted({label for _, label, _ in known if label is not None})
        y = torch.tensor([names.index(label) for _, label, _ in known if label is not None])
        return OwnClasses(
            names,
            (self._encode(known), y),
            "text",
            [text.text for text in asked],
            self._encode(asked),
            truth_of_all(query, [text.label for text in asked]),
        )

    def _encode(self, read: Sequence[Text]) -> Tensor:
        return self.inputs(table(self.tokens([text.text for text in read], self.length), self.length))


@dataclass(eq=False, kw_only=True)
class OwnText(FewShotText):
    """Texts of your own: a CSV or JSONL file of texts and labels, or a folder with one folder of .txt files a class.

    Classes are divided among the splits by ``split_file`` or, shuffled by ``split_seed``, by ``fractions``. Where
    ``domains`` groups the classes, whole domains are divided, so that no test task is of a domain that was trained on.
    """

    path: Annotated[str, "The .csv or .jsonl file, or the folder."]
    domains: Annotated[str | None, "JSON file with the list of the classes of each domain; null: none."] = None
    split_file: Annotated[
        str | None, "JSON file with lists of classes (or domains) called train, val and test; null: fractions."
    ] = None
    fractions: Fractions = USUAL
    split_seed: Annotated[int, "The seed that shuffles the classes (or domains) before they are divided."] = 0
    out_of_scope: Annotated[
        str | None, "Label of the texts that fit no class, for evaluate --out-of-scope; null: there are none."
    ] = None

    name: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.fractions)

    def files(self) -> list[Path]:
        """The file, or all files of the folder."""
        path = Path(self.path).expanduser()
        if not path.exists():
            raise DataError(f"tasks.path: there is no file or folder {path}")
        return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]

    def read(self) -> Iterator[Text]:
        """All texts of the file or folder."""
        return texts(Path(self.path).expanduser(), self.text_column, self.label_column, labelled=True)

    @property
    def outsiders(self) -> dict[Split, str]:
        """The texts labelled ``out_of_scope``, for all splits."""
        return {} if self.out_of_scope is None else dict.fromkeys(SPLITS, self.out_of_scope)

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The classes of ``split``."""
        if self.out_of_scope is not None and self.out_of_scope not in names:
            raise DataError(f"tasks.out_of_scope: no text of {self.path} has the label {self.out_of_scope!r}")
        unit_of = _units([name for name in names if name != self.out_of_scope], self.domains)
        units = sorted(set(unit_of.values()))
        if self.split_file is not None:
            chosen = listed(read_lists(Path(self.split_file).expanduser()), units, self.split_file)[split]
        else:
            chosen = by_fractions(units, self.fractions, self.split_seed, "text")[split]
        return np.array([i for i, name in enumerate(names) if unit_of.get(name) in chosen], np.int64)


_CLINC_TEST = ("travel", "auto_and_commute", "work", "kitchen_and_dining")
_CLINC_VAL = ("meta",)
_CLINC = {
    "data_full.json": "30c29dc6ab78edf3b5dfa640be204cde",
    "domains.json": "9beee9d0f36e07e914c1e3a626bdcb4a",
}
"""The files, and their MD5 checksums."""
_CLINC_TEXTS = 150 * 150 + 1200
_OUTSIDE = "oos"  # the label of texts out of scope


@dataclass(eq=False, kw_only=True)
class Clinc150(FewShotText):
    """CLINC150: what people ask an assistant for, 150 intents of 10 domains (Larson et al., EMNLP 2019; CC BY 3.0).

    150 sentences an intent, and 1,200 that fit none (out of scope: 100 for training, 100 for validation, 1,000 for
    test), which are in no task. Read from ``data_root/clinc150``, downloaded there if it is missing.

    No few-shot split is official. ``domains``: 5 domains for training (banking, credit cards, home, utility, small
    talk), 1 for validation (meta), 4 for test (travel, auto and commute, work, kitchen and dining). ``random``: 90, 15
    and 45 intents, shuffled by ``split_seed``.
    """

    split: Annotated[
        Literal["domains", "random"], "Whether test tasks are of unseen domains, or of unseen intents of any domain."
    ] = "domains"
    split_seed: Annotated[int, "The seed that shuffles the intents of the random split."] = 0
    url: Annotated[str, "The folder on the web that the files are downloaded from; change it for a mirror."] = (
        "https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data"
    )

    name: ClassVar[str] = "clinc150"
    licence: ClassVar[str] = "CC BY 3.0"

    def files(self) -> list[Path]:
        """The two files, downloaded where they are missing."""
        found = [self.root / "clinc150" / file for file in _CLINC]
        for file in found:
            if not file.exists():
                download(f"{self.url.rstrip('/')}/{file.name}", file, _CLINC[file.name])
        return found

    def source_key(self) -> str:
        """See `FewShotText.source_key`; since texts out of scope are among the groups."""
        return f"{super().source_key()} {_OUTSIDE}"

    @property
    def outsiders(self) -> dict[Split, str]:
        """``oos/train``, ``oos/val`` and ``oos/test``, as the data set divides them."""
        return {split: f"{_OUTSIDE}/{split}" for split in SPLITS}

    def read(self) -> Iterator[Text]:
        """All sentences; an intent is called ``domain/intent``."""
        data, domains = self.files()
        lists = read_lists(domains)
        domain_of = {intent: domain for domain, intents in lists.items() for intent in intents}
        whole = read_json(data)
        parts: list[tuple[str, Split]] = [(part, split) for split in SPLITS for part in (split, f"{_OUTSIDE}_{split}")]
        total = sum(len(whole.get(part, ())) for part, _ in parts)
        if total != _CLINC_TEXTS:
            raise DataError(
                f"{data} holds {total} texts instead of {_CLINC_TEXTS}; delete it to have it downloaded again"
            )
        for part, split in parts:
            for number, pair in enumerate(whole[part]):
                place = f"{data}, {part}[{number}]"
                if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(cell, str) for cell in pair)):
                    raise DataError(
                        f"{place} is no pair of a text and an intent; delete it to have it downloaded again"
                    )
                text, intent = pair
                if part != split:
                    yield Text(text, self.outsiders[split], place)
                elif intent in domain_of:
                    yield Text(text, f"{domain_of[intent]}/{intent}", place)
                else:
                    raise DataError(f"{place}: {domains} has no domain of the intent {intent!r}")

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The intents of ``split``."""
        intents = [i for i, name in enumerate(names) if name not in self.outsiders.values()]
        if self.split == "random":
            shuffled = stream("clinc150", self.split_seed).permutation(len(intents))
            first, last = {"train": (0, 90), "val": (90, 105), "test": (105, len(intents))}[split]
            return np.array(intents, np.int64)[np.sort(shuffled[first:last])]
        own = {"val": _CLINC_VAL, "test": _CLINC_TEST}.get(split)
        domains = [name.split("/")[0] for name in names]
        chosen = (domains[i] in own if own else domains[i] not in _CLINC_VAL + _CLINC_TEST for i in intents)
        return np.array(intents, np.int64)[np.array(list(chosen))]


def _group(read: Iterable[Text]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """The texts of each class, and the places of those that are empty and of those that came before."""
    by_class: dict[str, list[str]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    empty: list[str] = []
    twice: list[str] = []
    for text, label, place in read:
        if label is None or not label.strip():
            raise DataError(f"{place} has no label")
        label = label.strip()
        plain = normal(text)
        if not plain:
            empty.append(place)
        elif (label, plain) in seen:
            twice.append(f"{place}: {text.strip()[:60]!r}")
        else:
            seen.add((label, plain))
            by_class[label].append(text)
    return dict(by_class), empty, twice


def _not_empty(text: Text) -> Text:
    if not text.text.strip():
        raise DataError(f"{text.place} has an empty text")
    if text.label is not None and not text.label.strip():
        raise DataError(f"{text.place} has an empty label")
    return text._replace(label=None if text.label is None else text.label.strip())


def _units(names: Sequence[str], domains: str | None) -> dict[str, str]:
    """What is divided among the splits, a class or its domain, for each class."""
    if domains is None:
        return {name: name for name in names}
    domain_of = {name: domain for domain, members in read_lists(Path(domains).expanduser()).items() for name in members}
    for name in names:
        if name not in domain_of:
            raise DataError(f"{domains} has no domain of the class {name!r}")
    return {name: domain_of[name] for name in names}

"""Few-shot translation: each task is a language (or a domain) with a few pairs of sentences, after Gu et al.,
"Meta-learning for low-resource neural machine translation", EMNLP 2018."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.pretrained import MISSING
from distmeta.core.types import Batch, Episode, Split, TaskSpec
from distmeta.errors import ConfigError, DataError
from distmeta.tasks import catalogues
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.datasets import DataTasks
from distmeta.tasks.own import Predict, Predictions, truth_of_all
from distmeta.tasks.splits import SPLITS
from distmeta.tasks.tables import read_text, rows
from distmeta.tasks.tokens import PADDING, Bytes, table

log = logging.getLogger("distmeta")

_BYTES = Bytes()
_BEGIN, _END = _BYTES.vocabulary, _BYTES.vocabulary + 1  # of a target
_VOCABULARY = _BYTES.vocabulary + 2
_NEW = " (new)"  # marks the group of a language's pairs whose targets training never sees


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str
    place: str


@dataclass(eq=False, kw_only=True)
class FewShotTranslation(DataTasks):
    """Translation into one language from many: a task is a source language, with ``shots`` pairs to adapt to.

    Tokens are the bytes of UTF-8, which every script has and nothing has to be learned for. A share ``new_targets`` of
    all target sentences is kept for the queries of validation and test: training then sees them in no language.

    A batch is (source, prefix, target), each int64 [pairs, length] with −1 behind the end: the prefix is the target
    behind a sign of its beginning, the target ends in a sign of its end, and the loss is the mean cross-entropy of its
    tokens. Evaluation decodes greedily and gives chrF (Popović, WMT 2015) and BLEU by sacreBLEU, of all queries of a
    task together, and the share of queries translated ``exact`` to the byte.

    Raises:
        ConfigError: a field is out of range, or sacreBLEU is not installed.
    """

    shots: Annotated[int, "Support pairs of each task (K)."] = 100
    queries: Annotated[int, "Query pairs of each task (Q)."] = 50
    train_shots: Annotated[int | None, "Support pairs in meta-training; null: as shots."] = None
    train_queries: Annotated[int | None, "Query pairs in meta-training; null: as queries."] = None
    length: Annotated[int, "Bytes of a sentence at most; pairs with a longer one are left out."] = 48
    new_targets: Annotated[float, "Share of the target sentences that only queries of val and test have."] = 0.2

    def __post_init__(self) -> None:
        for key in ("shots", "queries", "train_shots", "train_queries", "length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"tasks.{key} is {value}; it must be 1 or more")
        if not 0 <= self.new_targets < 1:
            raise ConfigError(f"tasks.new_targets is {self.new_targets}; it must be 0 or more, and below 1")

    @abstractmethod
    def read(self) -> Iterable[tuple[str, Iterable[Pair]]]:
        """The pairs of each language, by its name.

        Raises:
            DataError: they cannot be read.
        """

    @abstractmethod
    def held_out(self) -> dict[Split, tuple[str, ...]]:
        """The languages of ``val`` and ``test``; the others are for training."""

    @property
    def spec(self) -> TaskSpec:
        """What a model is built for."""
        shape = (self.length + 1,)
        return TaskSpec(shape, _VOCABULARY, "token_cross_entropy", _VOCABULARY, self.judge, "chrf")

    def prepare(self, splits: Sequence[Split] = SPLITS) -> None:
        """See `DataTasks.prepare`."""
        if importlib.util.find_spec("sacrebleu") is None:
            raise ConfigError(f"tasks of translation are judged by the library sacrebleu; {MISSING}")
        super().prepare(splits)

    def build(self) -> ExampleSet:
        """int16 [pairs, 2, length + 1], sources and targets, each language's seen pairs before its new ones."""
        names: list[str] = []
        counts: list[int] = []
        examples: list[NDArray[np.int32]] = []
        long: list[str] = []
        empty: list[str] = []
        for language, pairs in self.read():
            parts: dict[bool, dict[tuple[str, str], None]] = {False: {}, True: {}}  # without duplicates, in order
            for source, target, place in pairs:
                source, target = plain(source), plain(target)
                if not source or not target:
                    empty.append(place)
                elif max(len(source.encode()), len(target.encode())) > self.length:
                    long.append(place)
                else:
                    parts[self._is_new(target)][source, target] = None
            for new, part in parts.items():
                names.append(language + _NEW * new)
                counts.append(len(part))
                examples.append(encode_pairs(list(part), self.length))
        for what, places in (
            ("with an empty sentence", empty),
            (f"longer than tasks.length = {self.length} bytes", long),
        ):
            if len(places) == 1:
                log.warning("1 pair %s is left out: %s", what, places[0])
            elif places:
                log.warning("%d pairs %s are left out, the first: %s", len(places), what, places[0])
        if not names:
            raise DataError(f"there are no pairs of {self.name}")
        return ExampleSet(np.concatenate(examples).astype(np.int16), tuple(names), np.array(counts, np.int64))

    def _is_new(self, target: str) -> bool:
        """A function of the text alone, so that it is the same in all languages."""
        digest = hashlib.blake2b(target.casefold().encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.new_targets * 2**64

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The groups of seen pairs of the languages of ``split``; each is followed by the group of its new ones."""
        held_out = self.held_out()
        for part, languages in held_out.items():
            for language in languages:
                if language not in names:
                    raise DataError(f"tasks.{part} names {language!r}, of which {self.name} has no pairs")
        both = set(held_out["val"]) & set(held_out["test"])
        if both:
            raise ConfigError(f"{', '.join(sorted(both))} is both in tasks.val and in tasks.test")
        other = {*held_out["val"], *held_out["test"]}
        own = held_out.get(split)
        seen = [i for i, name in enumerate(names) if not name.endswith(_NEW)]
        return np.array([i for i in seen if (names[i] in own if own is not None else names[i] not in other)], np.int64)

    def _sizes(self, split: Split) -> tuple[int, int]:
        if split != "train":
            return self.shots, self.queries
        return self.train_shots or self.shots, self.train_queries or self.queries

    def _apart(self, split: Split) -> bool:
        """Whether queries come from the new targets."""
        return split != "train" and self.new_targets > 0

    def check(self, split: Split, members: NDArray[np.int64]) -> None:
        """Enough pairs in each language."""
        shots, queries = self._sizes(split)
        if not len(members):
            raise DataError(f"the {split} split of {self.name} has no language; name some by tasks.{split}")
        for group in members:
            name, (seen, new) = self.dataset.names[group], self.dataset.counts[group : group + 2]
            if seen < shots + (0 if self._apart(split) else queries) or (self._apart(split) and new < queries):
                raise DataError(
                    f"{name} of {self.name} ({split}) has {seen} pairs and {new} of new targets, too few for {shots} "
                    f"shots and {queries} queries: lower tasks.shots, tasks.queries or tasks.new_targets"
                )

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws a language and distinct pairs of it."""
        shots, queries = self._sizes(split)
        group = int(rng.choice(self.checked(split)))
        (seen, new), start = self.dataset.counts[group : group + 2], self.dataset.starts[group]
        if self._apart(split):
            support = start + rng.permutation(seen)[:shots]
            query = start + seen + rng.permutation(new)[:queries]
        else:
            support, query = np.split(start + rng.permutation(seen)[: shots + queries], [shots])
        return Episode(*(batch_of(self.dataset.examples[rows]) for rows in (support, query)))

    def describe(self) -> str:
        """How many pairs and languages."""
        parts = [f"{split} {len(self.members[split])}" for split in SPLITS]
        return f"{len(self.dataset.examples):,} pairs, languages: {', '.join(parts)}"

    def judge(self, predict: Predict, query: Batch) -> dict[str, float]:
        """chrF and BLEU (0 to 100) and the share of exact translations of a query set."""
        return scores(decode(greedy(predict, query[0])), decode(query[-1]))

    def own_task(self, support: Path, query: Path) -> OwnPairs:
        """From a file as `ParallelText` reads them; the query may also be a .txt file with a sentence on each line."""
        known = self._fitting(support, pairs_of(support))
        asked = self._fitting(
            query, _lines(query) if query.suffix.lower() == ".txt" else pairs_of(query, optional=True)
        )
        for path, read in ((support, known), (query, asked)):
            if not read:
                raise DataError(f"{path} holds no sentences")
        for pair in known:
            if not pair.source or not pair.target:
                raise DataError(f"{pair.place} has an empty {'translation' if pair.source else 'sentence'}")
        examples = encode_pairs([(pair.source, pair.target) for pair in known], self.length)
        truth = truth_of_all(query, [pair.target or None for pair in asked])
        sources = [pair.source for pair in asked]
        return OwnPairs(batch_of(examples), sources, encode(sources, self.length), truth)

    def _fitting(self, path: Path, pairs: Iterable[Pair]) -> list[Pair]:
        """Those of at most ``length`` bytes; of a catalogue, which nobody shortens for this, others are left out."""
        read = [pair._replace(source=plain(pair.source), target=plain(pair.target)) for pair in pairs]
        longest = [max(len(text.encode()) for text in pair[:2]) for pair in read]
        long = [index for index, size in enumerate(longest) if size > self.length]
        if long and path.suffix.lower() not in catalogues.SUFFIXES:
            at = long[0]
            raise DataError(f"{read[at].place} has {longest[at]} bytes, more than tasks.length = {self.length}")
        if long:
            log.warning("%s: %d of %d messages are left out, which are longer than tasks.length = %d bytes",
                        path, len(long), len(read), self.length)  # fmt: skip
        return [pair for pair, size in zip(read, longest, strict=True) if size <= self.length]


def plain(sentence: str) -> str:
    """The sentence with single spaces, and none around it."""
    return " ".join(sentence.split())


@dataclass
class OwnPairs:
    """A user's pairs of sentences, and the sentences that are to be translated."""

    support: Batch
    sources: list[str]
    tokens: NDArray[np.int32]
    references: list[str] | None

    classes: ClassVar[list[str]] = []

    def predictions(self, predict: Predict) -> Predictions:
        """The translation of each sentence, and chrF where references are given."""
        translations = decode(greedy(predict, torch.from_numpy(self.tokens.astype(np.int64))))
        if self.references is None:
            pairs = [list(pair) for pair in zip(self.sources, translations, strict=True)]
            return Predictions(["source", "translation"], pairs, {})
        table = [list(row) for row in zip(self.sources, translations, self.references, strict=True)]
        return Predictions(["source", "translation", "reference"], table, scores(translations, self.references))


@dataclass(eq=False, kw_only=True)
class ParallelText(FewShotTranslation):
    """Pairs of sentences of your own: a folder with a file for each language (or domain).

    A line of a ``.tsv`` file is a sentence, a tab and its translation; a line of a ``.jsonl`` file has ``source`` and
    ``target``; a ``.po`` or ``.mo`` file is a catalogue of a program's messages, whose translations are the sources and
    whose originals, in the language that all share, the targets. The name of a file, without its ending, is that of its
    language. A folder without such files may have catalogues at any depth as gettext lays them out,
    ``LANGUAGE/LC_MESSAGES/DOMAIN.mo`` or ``.po``.
    """

    path: Annotated[str, "The folder."]
    val: Annotated[tuple[str, ...], "Languages for meta-validation."]
    test: Annotated[tuple[str, ...], "Languages for meta-testing; all that are in neither are for training."]
    least: Annotated[int, "Pairs of at most tasks.length that a language must have; others are left out."] = 0

    name: ClassVar[str] = "parallel"

    def held_out(self) -> dict[Split, tuple[str, ...]]:
        """As the settings say."""
        return {"val": self.val, "test": self.test}

    def _files(self) -> dict[str, list[Path]]:
        """The files of each language."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise DataError(f"tasks.path: there is no folder {folder}")
        files: dict[str, list[Path]] = {}
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in (".tsv", ".jsonl", *catalogues.SUFFIXES):
                files.setdefault(file.stem, []).append(file)
        files = files or catalogues.by_language(folder)
        if not files:
            raise DataError(
                f"{folder} holds no .tsv, .jsonl, .po or .mo files, and no catalogues in LANGUAGE/LC_MESSAGES"
            )
        return files

    def source_key(self) -> str:
        """Names, sizes and times of the files."""
        files = [file for own in self._files().values() for file in own]
        lines = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        return "\n".join([*lines, f"{self.length} {self.new_targets} {self.least}"])

    def read(self) -> Iterator[tuple[str, Iterable[Pair]]]:
        """The pairs of each language."""
        for language, files in self._files().items():
            pairs = [pair for file in files for pair in pairs_of(file)]
            if sum(max(len(text.encode()) for text in pair[:2]) <= self.length for pair in pairs) >= self.least:
                yield language, pairs


def encode(sentences: Iterable[str], length: int) -> NDArray[np.int32]:
    """The bytes of each sentence and the sign of its end: [n, length + 1]."""
    return table([[*tokens, _END] for tokens in _BYTES(list(sentences), length)], length + 1)


def encode_pairs(pairs: Sequence[tuple[str, str]], length: int) -> NDArray[np.int32]:
    """Sources and targets: [n, 2, length + 1]."""
    return np.stack([encode([pair[side] for pair in pairs], length) for side in (0, 1)], 1)


def decode(tokens_BL: Tensor) -> list[str]:
    """The sentences that rows of tokens stand for, up to the sign of their end."""
    made: list[str] = []
    for row in tokens_BL.tolist():
        ended = row[: row.index(_END)] if _END in row else row
        made.append(bytes(token for token in ended if 0 <= token < _BYTES.vocabulary).decode("utf-8", "replace"))
    return made


def batch_of(examples: NDArray[Any]) -> Batch:
    """(source, prefix, target) of rows of the data set."""
    source, target = (torch.from_numpy(part.astype(np.int64)) for part in (examples[:, 0], examples[:, 1]))
    prefix = target.roll(1, 1)
    prefix[:, 0] = _BEGIN
    prefix[prefix == _END] = PADDING  # nothing follows it
    return source, prefix, target


@torch.no_grad()
def greedy(predict: Predict, source_BL: Tensor) -> Tensor:
    """The translations that take the likeliest token each time: (B, at most L) tokens."""
    prefix_BT = torch.full((len(source_BL), 1), _BEGIN, dtype=torch.int64, device=source_BL.device)
    ended_B = torch.zeros(len(source_BL), dtype=torch.bool, device=source_BL.device)
    for _ in range(source_BL.shape[1]):
        following_B = predict(source_BL, prefix_BT)[:, -1].argmax(-1)
        prefix_BT = torch.cat([prefix_BT, following_B[:, None]], 1)
        ended_B |= following_B == _END
        if bool(ended_B.all()):
            break
    return prefix_BT[:, 1:]


def scores(translations: list[str], references: list[str]) -> dict[str, float]:
    """chrF, BLEU and the share of exact translations."""
    import sacrebleu

    exact = [one == other for one, other in zip(translations, references, strict=True)]
    return {
        "chrf": sacrebleu.corpus_chrf(translations, [references]).score,
        "bleu": sacrebleu.corpus_bleu(translations, [references], force=True).score,
        "exact": sum(exact) / len(exact),
    }


def pairs_of(path: Path, *, optional: bool = False) -> Iterator[Pair]:
    """The pairs of a TSV or JSON lines file or a catalogue; with ``optional`` the translation may be missing (empty).

    Raises:
        DataError: The file cannot be read, or a line is none, which is named.
    """
    if path.suffix.lower() == ".jsonl":
        needed, more = (["source"], ["target"]) if optional else (["source", "target"], [])
        for place, (source, target) in rows(path, needed, more):
            yield Pair(source or "", target or "", place)
        return
    if path.suffix.lower() in catalogues.SUFFIXES:
        yield from (Pair(*message) for message in catalogues.messages(path))
        return
    if path.suffix.lower() != ".tsv":
        more = ", nor a .txt file of sentences" if optional else ""
        raise DataError(f"{path} is neither a .tsv, .jsonl, .po nor .mo file of pairs{more}")
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != 2 and not (optional and len(cells) == 1):
            raise DataError(
                f"{path}, line {number} has {len(cells)} cells; a sentence, a tab and its translation are expected: "
                f"{json.dumps(line[:60], ensure_ascii=False)}"
            )
        yield Pair(cells[0].strip(), cells[1].strip() if len(cells) > 1 else "", f"{path}, line {number}")


def _lines(path: Path) -> Iterator[Pair]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield Pair(line.strip(), "", f"{path}, line {number}")

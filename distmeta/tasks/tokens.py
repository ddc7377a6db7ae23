"""From texts to numbers of tokens."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distmeta.core.pretrained import MISSING, locate
from distmeta.errors import ConfigError

PADDING = -1
"""Stands behind the end of a text; no tokenizer gives it."""


class Tokenizer(Protocol):
    """From texts to lists of numbers."""

    vocabulary: int
    """Tokens are numbered from 0 to ``vocabulary`` − 1."""
    key: str
    """Names all that the numbers depend on."""

    def __call__(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """The tokens of each text, at most ``length`` of them."""
        ...


class Words:
    """Words and signs without regard to case, each hashed (CRC-32) to one of ``vocabulary`` numbers.

    Nothing is to be learned or downloaded, and words that training never saw have numbers too; two words may share one.
    """

    _PATTERN = re.compile(r"\w+|[^\w\s]")

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.key = f"words {vocabulary}"

    def __call__(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """See `Tokenizer`."""
        number = functools.cache(lambda word: zlib.crc32(word.encode()) % self.vocabulary)
        return [[number(word) for word in self._PATTERN.findall(normal(text))[:length]] for text in texts]


class Bytes:
    """The bytes of UTF-8: any script, with nothing unknown, and long."""

    vocabulary = 256
    key = "bytes"

    def __call__(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """See `Tokenizer`."""
        return [list(unicodedata.normalize("NFC", text).encode())[:length] for text in texts]


class Pretrained:
    """The tokenizer of a pretrained model, from its ``tokenizer.json``.

    Raises:
        ConfigError: The library tokenizers is not installed, or the model has no such file.
    """

    def __init__(self, source: str) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ConfigError(f"tasks.tokenizer: hf:{source} needs the library tokenizers; {MISSING}") from error
        place = locate(source)
        try:
            self._library: Any
            if Path(place).is_dir():
                file = Path(place) / "tokenizer.json"
                if not file.is_file():
                    raise ConfigError(f"tasks.tokenizer: {place} holds no tokenizer.json")
                self._library = Library.from_file(str(file))
            else:
                self._library = Library.from_pretrained(place)
        except ConfigError:
            raise
        except Exception as error:  # the library raises plain exceptions
            raise ConfigError(f"tasks.tokenizer: hf:{source} cannot be loaded: {error}") from error
        self._library.no_padding()
        self._library.no_truncation()
        self.vocabulary = int(self._library.get_vocab_size())
        self.key = "hf " + hashlib.sha256(self._library.to_str().encode()).hexdigest()

    def __call__(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """See `Tokenizer`; the signs that end a text stay where it is cut."""
        self._library.enable_truncation(length)
        return [list(encoding.ids) for encoding in self._library.encode_batch(list(texts))]


@functools.lru_cache(8)
def tokenizer_of(name: str, vocabulary: int) -> Tokenizer:
    """The tokenizer that a configuration calls ``words``, ``bytes`` or ``hf:SOURCE``.

    Raises:
        ConfigError: There is none of that name.
    """
    if name == "words":
        return Words(vocabulary)
    if name == "bytes":
        return Bytes()
    if name.startswith("hf:"):
        return Pretrained(name.removeprefix("hf:"))
    raise ConfigError(f"tasks.tokenizer: {name!r} is not known; give words, bytes or hf:SOURCE")


def normal(text: str) -> str:
    """The text with compatible characters made one (NFKC), without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def table(lists: Iterable[list[int]], length: int) -> NDArray[np.int32]:
    """Lists of tokens as the rows of one array, padded."""
    lists = list(lists)
    made = np.full((len(lists), length), PADDING, np.int32)
    for row, tokens in zip(made, lists, strict=True):
        row[: len(tokens)] = tokens
    return made

"""Real text that every machine has: the sources of Python's own standard library, in a small byte-pair code."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

# Tests would be half of the text; encodings and pydoc_data are tables rather than code.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}

# What a token never straddles: a line break with the indentation after it, a word, a run of punctuation, white space.
WORD = re.compile(r"\n *| ?\w+| ?[^\w\s]+|\s")


def standard_library(validation_every: int = 20) -> tuple[str, str]:
    """(training, validation) text; every 20th file is held out. One character is one byte (Latin-1)."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts))
    if not files:
        raise SystemExit(f"This Python keeps no sources in {root}; the demo needs the standard library as .py files.")
    texts = [path.read_bytes().decode("latin-1") for path in files]
    validation = texts[::validation_every]
    del texts[::validation_every]
    return "".join(texts), "".join(validation)


class Tokenizer:
    """Byte-pair encoding: 256 bytes, then one token for each pair that was, in turn, the most frequent.

    Source: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016).
    """

    def __init__(self, merges: list[tuple[int, int]]) -> None:
        self.merges = merges
        self.vocabulary = [bytes([byte]) for byte in range(256)]
        for left, right in merges:
            self.vocabulary.append(self.vocabulary[left] + self.vocabulary[right])

    @classmethod
    def train(cls, text: str, size: int) -> Tokenizer:
        words = Counter(WORD.findall(text))
        ids, last = spell(words)
        count = np.repeat(list(words.values()), [len(word) for word in words])  # of the word that each token is in
        merges = []
        for new in range(256, size):
            pairs = ids[:-1] * size + ids[1:]
            left, right = divmod(int(np.bincount(pairs, np.where(last, 0, count)[:-1]).argmax()), size)
            merges.append((left, right))
            ids, last, kept = merge(ids, last, left, right, new)
            count = count[kept]
        return cls(merges)

    def encode(self, text: str) -> np.ndarray:
        words = WORD.findall(text)
        distinct = dict.fromkeys(words)
        ids, last = spell(distinct)
        for new, (left, right) in enumerate(self.merges, start=256):
            ids, last, _ = merge(ids, last, left, right, new)
        tokens = dict(zip(distinct, np.split(ids, np.flatnonzero(last) + 1), strict=False))
        return np.concatenate([tokens[word] for word in words])

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.vocabulary[i] for i in ids).decode("utf-8", "replace")


def spell(words: dict[str, int] | dict[str, None]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all words in a row, and whether each is the last one of its word."""
    ids = np.frombuffer("".join(words).encode("latin-1"), dtype=np.uint8).astype(np.int64)
    last = np.zeros(len(ids), dtype=bool)
    last[np.cumsum([len(word) for word in words]) - 1] = True
    return ids, last


def merge(
    ids: np.ndarray, last: np.ndarray, left: int, right: int, new: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replace each (left, right) within a word by `new`; also returns which positions were kept."""
    hits = np.flatnonzero((ids[:-1] == left) & (ids[1:] == right) & ~last[:-1])
    if left == right:  # of overlapping hits, as in "aaa", every other one counts
        run_start = np.concatenate([[True], np.diff(hits) != 1])[: len(hits)]
        position = np.arange(len(hits))
        hits = hits[(position - np.maximum.accumulate(np.where(run_start, position, 0))) % 2 == 0]
    kept = np.ones(len(ids), dtype=bool)
    kept[hits + 1] = False
    ids[hits] = new
    last[hits] = last[hits + 1]
    return ids[kept], last[kept], kept

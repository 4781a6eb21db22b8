"""Tokenise a corpus once into files that every later run maps into memory.

``<cache>/tokens/<corpus>-<hash>/`` belongs to one (content, tokenizer) pair and holds, per split,
``<split>.bin`` (the ids, uint16 or uint32) and ``<split>.json`` (counts, sha256, versions), and the
tokenizer. A token file is used again if size, modification time and inode change time are those in
its side file, or else if its sha256 is; so a truncated, edited or foreign file is rebuilt, an edit
that keeps the size and sets back the modification time included. Not noticed: damage that the file
system does not report as a change, such as a failing disk.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

import scanlm
from scanlm.data.corpora import Corpus, load_corpus
from scanlm.data.files import digest, read_json, sha256_file, write_json
from scanlm.data.fingerprints import file_stamp
from scanlm.data.tokenizers import (
    check_byte_level,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
)
from scanlm.data.writer import write_tokens
from scanlm.errors import ScanLMError

FORMAT = 1


@dataclass(frozen=True)
class TokenSplit:
    """One split as tokens.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, mapped from `path`, read-only.
        num_tokens: the end-of-sequence token after each document included.
        num_words: whitespace-separated words of the text.
        num_lines: line feeds in the text.
        num_bytes: bytes of the text in UTF-8.
        path: the token file.
        sha256: of the token file.
    """

    tokens: np.ndarray = field(repr=False)
    num_tokens: int
    num_words: int
    num_lines: int
    num_bytes: int
    path: Path
    sha256: str


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus as token files.

    Attributes:
        name: of the corpus.
        tokenizer: what made the tokens.
        tokenizer_spec: how it was asked for.
        tokenizer_hash: `tokenizer_hash` of it: equal ids for equal texts.
        fingerprint: hash of the content of the corpus.
        splits: the splits that were prepared.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    tokenizer_spec: str
    tokenizer_hash: str
    fingerprint: str
    splits: dict[str, TokenSplit]

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, the added ones included."""
        return len(self.tokenizer)

    def __getitem__(self, split: str) -> TokenSplit:
        """The split, or a ScanLMError that lists those there are."""
        if split not in self.splits:
            raise ScanLMError(
                f"corpus {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[split]

    def counted_words(self, split: str) -> int:
        """What a perplexity per word divides by: words, on WikiText line ends too, as published."""
        part = self[split]
        lines = part.num_lines if self.name.startswith("wikitext") else 0
        return part.num_words + lines

    def require_tokenizer(self, expected: str, whose: str) -> None:
        """Raise a ScanLMError unless `expected`, the tokenizer hash of `whose`, is this one's."""
        if expected != self.tokenizer_hash:
            raise ScanLMError(
                f"corpus {self.name!r} is tokenised with {self.tokenizer_spec!r}, {whose} with "
                "another tokenizer; prepare the corpus with that one"
            )


def default_tokenizer(corpus: Corpus) -> str:
    """``bytes`` for the embedded corpus, which must not need a download; else ``gpt2``."""
    return "bytes" if corpus.name.partition("#")[0] == "embedded" else "gpt2"


def content_fingerprint(corpus: Corpus, cache_dir: str | Path) -> str:
    """A hash of the content of all splits; files that have not changed are not reread."""
    return digest({split: corpus.fingerprint(split, cache_dir) for split in corpus.splits})


def prepare(
    corpus: Corpus | str | Path,
    tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
    cache_dir: str | Path = "data/cache",
    splits: Iterable[str] | None = None,
) -> TokenizedCorpus:
    """The corpus as token files, made now or, when they are there and unchanged, only opened.

    The ids of a continuous split are those of its text encoded as one string. Memory stays bounded
    however long the text is. Several processes may prepare one corpus at once: one works, the
    others wait. A corpus of the Hub that has been prepared is opened without the network.

    Args:
        corpus: a corpus, or a name or path for `load_corpus`.
        tokenizer: a tokenizer or what `load_tokenizer` takes; default `default_tokenizer`.
        cache_dir: where the token files are; made if missing.
        splits: the splits wanted; default all of the corpus.

    Raises:
        ScanLMError: a missing, empty or blank split, text that is not UTF-8, an unknown corpus or
            tokenizer, a cache folder that cannot be written, a full disk.
    """
    cache = Path(cache_dir)
    if not isinstance(corpus, Corpus):
        corpus = load_corpus(corpus)
    wanted = tuple(dict.fromkeys(splits)) if splits is not None else corpus.splits
    for split in wanted:
        corpus.require(split)
    if tokenizer is None:
        tokenizer = default_tokenizer(corpus)
    index = None
    if isinstance(tokenizer, str | Path):
        spec = str(tokenizer)
        if corpus.offline_key:
            index = cache / "index" / f"{digest([corpus.offline_key, spec])[:24]}.json"
            if found := _open(cache / str(read_json(index).get("entry")), wanted, spec):
                return found
        loaded = load_tokenizer(spec, corpus, cache)
    else:
        spec, loaded = tokenizer.name_or_path or "custom", tokenizer
    check_byte_level(loaded, spec)
    content = content_fingerprint(corpus, cache)
    encoder = tokenizer_hash(loaded)
    readable = re.sub(r"[^\w.-]+", "-", corpus.name)[:40].strip("-.")
    entry = cache / "tokens" / f"{readable}-{digest([FORMAT, content, encoder])[:16]}"
    identity = {"format": FORMAT, "content": content, "tokenizer_hash": encoder}
    missing = [split for split in wanted if not _is_valid(entry, split, identity)]
    if missing:
        try:
            entry.mkdir(parents=True, exist_ok=True)
            with FileLock(entry / "lock"):
                _build(corpus, loaded, spec, entry, identity, missing)
                if index is not None:
                    write_json(index, {"entry": entry.relative_to(cache).as_posix()})
        except OSError as error:
            raise ScanLMError(
                f"cannot write token files to {entry}: {error.strerror or error}; choose another "
                "cache folder or make this one writable"
            ) from error
    result = {split: _split(entry, split) for split in wanted}
    return TokenizedCorpus(corpus.name, loaded, spec, encoder, content, result)


def _build(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    spec: str,
    entry: Path,
    identity: dict[str, Any],
    missing: list[str],
) -> None:
    """Write the splits that are still missing once the lock is held."""
    for leftover in entry.glob("*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    folder = entry / "tokenizer"
    if not folder.is_dir():
        save_tokenizer(tokenizer, folder)
    versions = {"python": platform.python_version(), "scanlm": scanlm.__version__}
    for package in ("numpy", "tokenizers", "transformers"):
        versions[package] = importlib.metadata.version(package)
    for split in missing:
        # Another process may have written it while this one waited.
        if _is_valid(entry, split, identity):
            continue
        path = entry / f"{split}.bin"
        facts = write_tokens(corpus, split, tokenizer, path)
        side = identity | facts | {"stamp": file_stamp(path), "corpus": corpus.name}
        side |= {"split": split, "tokenizer_spec": spec, "versions": versions}
        write_json(entry / f"{split}.json", side)


def _is_valid(entry: Path, split: str, identity: dict[str, Any]) -> bool:
    """Whether the token file is the one its side file describes, for this content and tokenizer."""
    path, side_path = entry / f"{split}.bin", entry / f"{split}.json"
    side = read_json(side_path)
    needed = {"num_tokens", "num_words", "num_lines", "num_bytes", "dtype", "sha256", "stamp"}
    if not needed <= side.keys() or any(side.get(key) != identity[key] for key in identity):
        return False
    try:
        stamp = file_stamp(path)
        if stamp == side["stamp"]:
            return True
        if stamp["size"] != side["stamp"]["size"] or sha256_file(path) != side["sha256"]:
            return False
    except OSError:
        return False
    # Only copied or touched. A read-only cache is hashed again next time.
    with contextlib.suppress(OSError):
        write_json(side_path, side | {"stamp": stamp})
    return True


def _split(entry: Path, split: str) -> TokenSplit:
    side = read_json(entry / f"{split}.json")
    path = entry / f"{split}.bin"
    tokens = np.memmap(path, dtype=np.dtype(side["dtype"]).newbyteorder("<"), mode="r")
    return TokenSplit(
        tokens=tokens,
        num_tokens=int(side["num_tokens"]),
        num_words=int(side["num_words"]),
        num_lines=int(side["num_lines"]),
        num_bytes=int(side["num_bytes"]),
        path=path,
        sha256=side["sha256"],
    )


def _open(entry: Path, wanted: tuple[str, ...], spec: str) -> TokenizedCorpus | None:
    """A prepared entry opened by itself; None unless all splits are there and valid."""
    sides = [read_json(entry / f"{split}.json") for split in wanted]
    identity = {key: sides[0].get(key) for key in ("format", "content", "tokenizer_hash")}
    if not all(identity.values()) or not all(_is_valid(entry, s, identity) for s in wanted):
        return None
    tokenizer = load_tokenizer(entry / "tokenizer")
    if tokenizer_hash(tokenizer) != identity["tokenizer_hash"]:
        return None
    splits = {split: _split(entry, split) for split in wanted}
    name, content = str(sides[0]["corpus"]), str(identity["content"])
    return TokenizedCorpus(name, tokenizer, spec, tokenizer_hash(tokenizer), content, splits)

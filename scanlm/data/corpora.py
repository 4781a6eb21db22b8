"""Corpora by name or path: pieces of text per split, read as a stream.

A corpus is *continuous* (text files: each split is one string) or made of *documents* (table rows:
the end-of-sequence token is added after each when the corpus is tokenised).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from scanlm.data.files import Piece, digest, read_rows, read_text, suffixes
from scanlm.data.fingerprints import file_fingerprint
from scanlm.errors import ScanLMError, nearest
from scanlm.values import natural_key

SPLITS = ("train", "validation", "test")
HUB_DATASET = "Salesforce/wikitext"
HUB_CONFIGS = {"wikitext-2": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}
NAMES = ("embedded", *HUB_CONFIGS)
COLUMN = "column="  # the rule that names the text column of tables
DEFAULT_COLUMN = "text"
_FORMATS = {".txt": "text", ".parquet": "table", ".jsonl": "table"}


class Corpus(ABC):
    """Text in splits.

    Attributes:
        name: how the corpus is called in records; no machine path.
        splits: the splits there are, in the order train, validation, test.
        documents: whether `texts` yields whole documents (True) or pieces of one string.
        offline_key: set where the content follows from the name alone and needs a network.
    """

    name: str
    splits: tuple[str, ...]
    documents: bool = False
    offline_key: str | None = None

    @abstractmethod
    def pieces(self, split: str) -> Iterator[Piece]:
        """Pieces of a split's text, each with the fraction of the split read so far."""

    @abstractmethod
    def fingerprint(self, split: str, cache_dir: str | Path | None = None) -> str:
        """A hash of the split's content; with a cache folder, unchanged files are not reread."""

    def counts(self, split: str) -> dict[str, int]:
        """``num_words`` and ``num_lines`` that losses are divided by, unless the text's own."""
        return {}

    def texts(self, split: str) -> Iterator[str]:
        """Pieces whose concatenation is the split's text, or its documents.

        Raises:
            ScanLMError: the corpus has no such split.
        """
        self.require(split)
        return (text for text, _ in self.pieces(split))

    def require(self, split: str) -> None:
        """Raise a ScanLMError that lists the splits there are unless `split` is one of them."""
        if split not in self.splits:
            raise ScanLMError(
                f"corpus {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
            )


class EmbeddedCorpus(Corpus):
    """English prose that every Python ships: the help topics of `pydoc_data.topics`.

    Topics repeat each other's paragraphs, so topics that share a paragraph of more than 80
    characters always go to the same split. These groups, largest first, each go to the split that
    is furthest below its share of the characters (80 % train, 10 % validation, 10 % test). Within a
    split the topics are sorted by name and joined by an empty line. The text differs a little
    between Python versions, and the fingerprint with it.
    """

    name = "embedded"
    splits = SPLITS
    shares: ClassVar[dict[str, float]] = {"train": 0.8, "validation": 0.1, "test": 0.1}

    @cached_property
    def topics(self) -> dict[str, list[str]]:
        """The names of the topics in each split."""
        from pydoc_data.topics import topics

        owner: dict[str, str] = {}
        group = {name: [name] for name in sorted(topics)}
        for name in sorted(topics):
            for paragraph in topics[name].split("\n\n"):
                if len(paragraph) <= 80:
                    continue
                other = group[owner.setdefault(paragraph, name)]
                if other is not group[name]:
                    other.extend(group[name])
                    for member in group[name]:
                        group[member] = other
        groups = {min(members): members for members in group.values()}
        sizes = {key: sum(len(topics[name]) for name in groups[key]) for key in groups}
        missing = {split: share * sum(sizes.values()) for split, share in self.shares.items()}
        chosen: dict[str, list[str]] = {split: [] for split in self.splits}
        for key in sorted(groups, key=lambda key: (-sizes[key], key)):
            split = max(missing, key=lambda split: missing[split])
            missing[split] -= sizes[key]
            chosen[split] += groups[key]
        return {split: sorted(names) for split, names in chosen.items()}

    def pieces(self, split: str) -> Iterator[Piece]:
        """The split's only piece, all of its text."""
        from pydoc_data.topics import topics

        yield "\n\n".join(topics[name].strip("\n") for name in self.topics[split]) + "\n", 1.0

    def fingerprint(self, split: str, cache_dir: str | Path | None = None) -> str:
        """The hash of the text itself, which is short."""
        return sha256("".join(self.texts(split)).encode()).hexdigest()


class HubCorpus(Corpus):
    """WikiText from the Hugging Face Hub, raw: the lines of each split, concatenated.

    A row without text is an empty line, as in the raw files.
    """

    splits = SPLITS

    def __init__(self, name: str) -> None:
        self.name = self.offline_key = name

    def _rows(self, split: str) -> Any:
        import datasets  # type: ignore[import-untyped]

        try:
            return datasets.load_dataset(HUB_DATASET, HUB_CONFIGS[self.name], split=split)
        # Without a network the loader raises whatever its HTTP client does.
        except Exception as error:
            raise ScanLMError(
                f"cannot load corpus {self.name!r} ({HUB_DATASET}) from the Hugging Face Hub: "
                f"{type(error).__name__}; on a machine with network run `scanlm prepare "
                f"{self.name}`, copy the cache folder here if it is not shared, and set "
                "HF_HUB_OFFLINE=1"
            ) from error

    def pieces(self, split: str) -> Iterator[Piece]:
        """The split's lines, a few hundred at a time."""
        rows = self._rows(split)
        for start in range(0, len(rows), 256):
            lines = rows[start : start + 256]["text"]
            yield "".join(line or "\n" for line in lines), min((start + 256) / len(rows), 1.0)

    def fingerprint(self, split: str, cache_dir: str | Path | None = None) -> str:
        """The fingerprint that the datasets library gives the downloaded split."""
        return digest([HUB_DATASET, HUB_CONFIGS[self.name], split, self._rows(split)._fingerprint])


class FileCorpus(Corpus):
    """Local files per split: text, continuous, or a column of parquet/jsonl tables, documents.

    Args:
        name: without rules; a column other than the default becomes part of it.
        files: per split.
        column: the column of tables that holds the text, one document a row.

    Raises:
        ScanLMError: text files and tables, mixed.
    """

    def __init__(
        self, name: str, files: dict[str, list[Path]], column: str = DEFAULT_COLUMN
    ) -> None:
        kinds = {_FORMATS[suffixes(path)[0]] for paths in files.values() for path in paths}
        if len(kinds) > 1:
            raise ScanLMError(f"corpus {name!r} mixes text files and tables; keep one of them")
        self.files = files
        self.splits = tuple(split for split in SPLITS if split in files)
        self.documents = kinds == {"table"}
        self.column = column
        # The default has no rule: one corpus has one name.
        plain = not self.documents or column == DEFAULT_COLUMN
        self.name = name if plain else with_rule(name, COLUMN + column)

    def pieces(self, split: str) -> Iterator[Piece]:
        """The split's files one after the other, nothing put between them."""
        paths = self.files[split]
        total = max(sum(path.stat().st_size for path in paths), 1)
        before = 0
        for path in paths:
            size = path.stat().st_size
            rows = read_rows(path, self.column) if self.documents else read_text(path)
            for text, done in rows:
                yield text, (before + done * size) / total
            before += size

    def fingerprint(self, split: str, cache_dir: str | Path | None = None) -> str:
        """A hash of the files' bytes, their formats and the column read."""
        self.require(split)
        files = [[*suffixes(path), file_fingerprint(path, cache_dir)] for path in self.files[split]]
        return digest([files, self.column if self.documents else None])


def experiment_name(corpus: str) -> str:
    """The experiment that runs on a corpus belong to, a folder's name: ``wikitext103``."""
    name = corpus.partition("#")[0].replace("wikitext-", "wikitext")
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "corpus"


def with_rule(name: str, rule: str) -> str:
    """The name of a corpus that has one rule more."""
    return f"{name}{',' if '#' in name else '#'}{rule}"


def load_corpus(name_or_path: str | Path) -> Corpus:
    """A corpus by name or path; nothing large is read yet.

    Args:
        name_or_path: one of

            - ``embedded``: Python's help topics, always there (see `EmbeddedCorpus`);
            - ``wikitext-2``, ``wikitext-103``: raw WikiText from the Hugging Face Hub;
            - a folder with ``<split>.txt`` or shards ``<split>-*.txt``, plain or compressed (.gz,
              .xz, .zst), for one or more of the splits train, validation and test. Shards are
              joined in natural order (2 before 10) with nothing between them;
            - a folder with ``<split>.parquet``/``<split>-*.parquet`` or .jsonl (also compressed);
            - a single file of these kinds: its split is the one its name starts with, else train.

            ``#`` adds rules in any order, separated by commas or ``&``: ``#column=content`` names
            the column of a table that holds the text, one document a row, unless it is ``text``;
            ``#detokenized`` undoes WikiText's tokenisation (see `detokenize`); others build splits
            out of slices of others, for example
            ``folder#train=validation[:90%],validation=validation[90%:]`` (see `slices`).

    Raises:
        ScanLMError: unknown name, no usable file, two files for one shard, a bad slice, a column of
            plain text. That a table has no such column is noticed when it is read.
    """
    from scanlm.data.detokenize import RULE, DetokenizedCorpus
    from scanlm.data.slices import resplit

    spec = str(name_or_path)
    if "#" not in spec or Path(spec).exists():
        return _without_rules(spec, DEFAULT_COLUMN)
    base, _, text = spec.partition("#")
    rules = [rule.strip() for rule in re.split("[,&]", text)]
    columns = [rule.removeprefix(COLUMN) for rule in rules if rule.startswith(COLUMN)]
    if len(columns) > 1 or "" in columns:
        raise ScanLMError(f"corpus {spec!r}: expected one column, for example {COLUMN}content")
    corpus = _without_rules(base, *(columns or [DEFAULT_COLUMN]))
    if columns and not corpus.documents:
        raise ScanLMError(
            f"corpus {base!r} is plain text, which has no columns: leave out {COLUMN}{columns[0]}"
        )
    rules = [rule for rule in rules if not rule.startswith(COLUMN)]
    if RULE in rules:
        corpus = DetokenizedCorpus(corpus)
        rules.remove(RULE)
    return resplit(corpus, ",".join(rules)) if rules else corpus


def _without_rules(spec: str, column: str) -> Corpus:
    """The corpus that a spec names before its rules; the column matters to tables alone."""
    aliases = {config: name for name, config in HUB_CONFIGS.items()}
    if spec in HUB_CONFIGS or spec in aliases:
        return HubCorpus(aliases.get(spec, spec))
    if spec == "embedded":
        return EmbeddedCorpus()
    path = Path(spec).expanduser()
    if path.is_dir():
        return FileCorpus(path.resolve().name, _folder_files(path), column)
    if path.is_file():
        if suffixes(path)[0] not in _FORMATS:
            raise ScanLMError(
                f"corpus file {spec!r}: expected .txt, .parquet or .jsonl (text also as "
                ".gz, .xz, .zst)"
            )
        return FileCorpus(path.name, {_split_of(path) or "train": [path]}, column)
    raise ScanLMError(
        f"unknown corpus {spec!r}: neither a name nor an existing folder or file."
        f"{nearest(spec, NAMES)}"
    )


def _split_of(path: Path) -> str | None:
    match = re.match(rf"({'|'.join(SPLITS)})(-.*)?\.", path.name)
    return match.group(1) if match else None


def _folder_files(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    shards: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        split = _split_of(path)
        kind, compression = suffixes(path)
        if split is None or kind not in _FORMATS or not path.is_file():
            continue
        if (compression and kind == ".parquet") or path.name.startswith("."):
            continue
        shard = path.name.lower().removesuffix(compression).removesuffix(kind)
        other = shards.setdefault(shard, path)
        whole = shards.get(split)
        if other is not path or (whole is not None and files.get(split)):
            other = other if other is not path else files[split][0]
            raise ScanLMError(
                f"corpus folder {str(folder)!r}: {other.name} and {path.name} both claim split "
                f"{split!r}; keep one of them"
            )
        files.setdefault(split, []).append(path)
    if not files:
        raise ScanLMError(
            f"corpus folder {str(folder)!r}: expected train.txt, validation.txt or test.txt, "
            "shards like train-00.txt, their .gz/.xz/.zst, or the same as .parquet/.jsonl; "
            "found none"
        )
    return files
